"""Maps option names and values of other tools to those of this API. Error messages suggest the name of this API for a name of another tool."""

from __future__ import annotations

FIELD_ALIASES: dict[str, str] = {
    # model
    "basemodel": "model.source", "basemodelid": "model.source", "modelid": "model.source", "modelname": "model.source", "modelpath": "model.source",
    "modelnameorpath": "model.source", "pretrainedmodel": "model.source", "model.name": "model.source", "model.path": "model.source",
    "token": "model.tokenSecretRef", "hftoken": "model.tokenSecretRef", "hubtoken": "model.tokenSecretRef", "apitoken": "model.tokenSecretRef",
    "huggingfacetoken": "model.tokenSecretRef", "loadin4bit": "model.quantization.bits", "loadin8bit": "model.quantization.bits",
    "use4bit": "model.quantization.bits", "quantize": "model.quantization.bits", "flashattention": "model.attention",
    "useflashattention": "model.attention", "attnimplementation": "model.attention", "torchdtype": "model.dtype",
    # method
    "r": "method.lora.rank", "lorar": "method.lora.rank", "lorarank": "method.lora.rank", "loraalpha": "method.lora.alpha",
    "loradropout": "method.lora.dropout", "targetmodules": "method.lora.targetModules", "loratargetmodules": "method.lora.targetModules",
    "usedora": "method.lora.useDora", "userslora": "method.lora.rankStabilized", "peft": "method.lora", "method.qlora": "method.lora",
    "method.dora": "method.lora", "loraconfig": "method.lora", "finetuningtype": "method.type",
    # data
    "data": "dataset.train", "datapath": "dataset.train", "datasetpath": "dataset.train", "trainfile": "dataset.train", "trainpath": "dataset.train",
    "traindata": "dataset.train", "trainingdata": "dataset.train", "trainingfile": "dataset.train", "dataset.path": "dataset.train",
    "dataset.name": "dataset.train", "dataset.source": "dataset.train", "dataset.val": "dataset.validation", "dataset.eval": "dataset.validation",
    "dataset.valid": "dataset.validation", "dataset.type": "dataset.format",
    "valsetsize": "dataset.split.validation", "validationsplit": "dataset.split.validation", "testsize": "dataset.split.test",
    "dataset.system": "dataset.systemPrompt",
    "valdata": "dataset.validation", "valpath": "dataset.validation",
    "evaldata": "dataset.validation", "evalpath": "dataset.validation", "validationfile": "dataset.validation", "evaldataset": "dataset.validation",
    "maxlength": "dataset.maxSequenceLength", "maxseqlength": "dataset.maxSequenceLength", "maxseqlen": "dataset.maxSequenceLength",
    "sequencelen": "dataset.maxSequenceLength", "cutofflen": "dataset.maxSequenceLength", "contextlength": "dataset.maxSequenceLength",
    "chattemplatekwargs": "dataset.templateVariables", "templatekwargs": "dataset.templateVariables", "dataset.enablethinking": "dataset.templateVariables",
    "modelmaxlength": "dataset.maxSequenceLength", "samplepacking": "dataset.packing", "trainonresponsesonly": "dataset.responseOnly.enabled",
    # training
    "lr": "training.learningRate", "numepochs": "training.epochs", "nepochs": "training.epochs", "numtrainepochs": "training.epochs",
    "training.steps": "training.maxSteps", "maxtrainsteps": "training.maxSteps", "numtrainsteps": "training.maxSteps", "totalsteps": "training.maxSteps",
    "iterations": "training.maxSteps", "iters": "training.maxSteps", "numsteps": "training.maxSteps", "batchsize": "training.batchSizePerDevice",
    "microbatchsize": "training.batchSizePerDevice", "effectivebatch": "training.effectiveBatchSize", "globalbatchsize": "training.effectiveBatchSize",
    "trainbatchsize": "training.batchSizePerDevice", "perdevicetrainbatchsize": "training.batchSizePerDevice",
    "gradaccsteps": "training.gradientAccumulationSteps", "gradaccumulation": "training.gradientAccumulationSteps",
    "gradientaccumulation": "training.gradientAccumulationSteps", "optim": "training.optimizer", "lrscheduler": "training.scheduler",
    "lrschedulertype": "training.scheduler", "schedulertype": "training.scheduler", "warmup": "training.warmupRatio",
    "gradientclipping": "training.maxGradNorm", "gradclip": "training.maxGradNorm", "clipgradnorm": "training.maxGradNorm",
    "wd": "training.weightDecay", "bf16": "training.mixedPrecision", "fp16": "training.mixedPrecision", "precision": "training.mixedPrecision",
    "usegradientcheckpointing": "training.gradientCheckpointing", "randomseed": "training.seed",
    # evaluation, checkpoints, tracking
    "evaluation.batchsize": "evaluation.batchSizePerDevice", "evalbatchsize": "evaluation.batchSizePerDevice",
    "perdeviceevalbatchsize": "evaluation.batchSizePerDevice", "evalsteps": "evaluation.steps", "evalstrategy": "evaluation.strategy",
    "evaluationstrategy": "evaluation.strategy", "savesteps": "checkpoint.steps", "checkpointsteps": "checkpoint.steps",
    "savestrategy": "checkpoint.strategy", "savetotallimit": "checkpoint.keep", "resumefromcheckpoint": "checkpoint.resume",
    "checkpoint.every": "checkpoint.steps", "checkpoint.interval": "checkpoint.steps", "checkpoint.frequency": "checkpoint.steps",
    "evaluation.every": "evaluation.steps", "evaluation.interval": "evaluation.steps", "resumefrom": "checkpoint.resume",
    "loadbestmodelatend": "checkpoint.loadBestAtEnd", "logsteps": "tracking.loggingSteps", "wandb": "tracking.reportTo", "report": "tracking.reportTo",
    # cluster
    "gpu": "resources.gpusPerNode", "gpus": "resources.gpusPerNode", "numgpus": "resources.gpusPerNode", "ngpus": "resources.gpusPerNode",
    "gpucount": "resources.gpusPerNode", "nprocpernode": "resources.processesPerNode", "numnodes": "resources.nodes", "nnodes": "resources.nodes",
    "replicas": "resources.nodes", "workers": "resources.nodes", "numworkers": "resources.nodes", "cpus": "resources.cpu", "numcpus": "resources.cpu",
    "ram": "resources.memory", "mem": "resources.memory", "disk": "resources.ephemeralStorage", "shm": "resources.sharedMemory",
    "shmsize": "resources.sharedMemory", "zerostage": "distributed.deepspeed.zeroStage", "outputdir": "storage.uri", "bucket": "storage.uri",
    "nvidia.com/gpu": "resources.gpusPerNode",
    "gputype": "resources.nodePool", "gpumodel": "resources.nodePool", "accelerator": "resources.nodePool", "acceleratortype": "resources.nodePool",
    "instancetype": "resources.nodePool", "machinetype": "resources.nodePool", "nodetype": "resources.nodePool", "pool": "resources.nodePool",
    "accesskey": "storage.credentialsSecretRef", "accesskeyid": "storage.credentialsSecretRef", "awsaccesskeyid": "storage.credentialsSecretRef",
    "secretkey": "storage.credentialsSecretRef", "secretaccesskey": "storage.credentialsSecretRef", "awssecretaccesskey": "storage.credentialsSecretRef",
    "credentials": "storage.credentialsSecretRef", "secretname": "storage.credentialsSecretRef", "secretref": "storage.credentialsSecretRef",
    "storage.path": "storage.uri", "storage.url": "storage.uri", "storage.prefix": "storage.uri", "storage.endpointurl": "storage.endpoint",
    "forcepathstyle": "storage.addressingStyle", "s3forcepathstyle": "storage.addressingStyle", "pathstyle": "storage.addressingStyle",
    "insecure": "storage.caBundleRef", "insecureskipverify": "storage.caBundleRef", "verifyssl": "storage.caBundleRef", "cabundle": "storage.caBundleRef",
    "placement.env[].valuefrom": "placement.env[].secretKeyRef", "affinity": "placement.nodeAffinity",
    "usevllm": "trainer.grpo.generation.backend", "vllm": "trainer.grpo.generation.backend",
    "vllmgpumemoryutilization": "trainer.grpo.generation.gpuMemoryUtilization",
    "contextparalleldegree": "distributed.contextParallelSize", "sequenceparalleldegree": "distributed.contextParallelSize",
    "sequenceparallelsize": "distributed.contextParallelSize", "cpsize": "distributed.contextParallelSize",
    "modelcache": "model.cache", "cachedir": "model.cache",
    "trainer.rewards[].timeout": "trainer.rewards[].timeoutSeconds",
    "queue": "placement.queueName", "localqueue": "placement.queueName", "timeout": "policy.activeDeadlineSeconds",
    "maxruntime": "policy.activeDeadlineSeconds", "deadline": "policy.activeDeadlineSeconds", "policy.ttldays": "policy.ttlSecondsAfterFinished",
    "ttl": "policy.ttlSecondsAfterFinished",
    "restartpolicy": "policy.retries", "maxretries": "policy.retries", "backofflimit": "policy.retries",
    "pushtohub": "output.hub.push", "hubmodelid": "output.hub.repository",
}  # fmt: skip
"""Maps option names of other tools to spec paths. The keys are in lower case, without `_` and `-`. A key `group.name` applies only to options in `group`."""

VALUE_ALIASES: dict[str, dict[str, str]] = {
    "method.type": {"peft": "lora", "fft": "full", "fullfinetuning": "full", "fullfinetune": "full", "ptuning": "promptTuning", "prefix": "prefixTuning"},
    "trainer.type": {
        "sfttrainer": "sft", "supervised": "sft", "instruction": "sft", "dpotrainer": "dpo", "grpotrainer": "grpo", "ktotrainer": "kto", "orpotrainer": "orpo",
        "rewardtrainer": "reward", "rewardmodel": "reward", "rm": "reward",
    },
    "model.dtype": {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"},
    "model.attention": {
        "flash": "flashAttention2", "flashattention": "flashAttention2", "flashattn": "flashAttention2", "flashattn2": "flashAttention2",
        "fa2": "flashAttention2", "xformers": "sdpa",
    },
    "dataset.format": {
        "chat": "messages", "chatml": "messages", "openai": "messages", "conversation": "messages", "conversations": "sharegpt", "chattemplate": "messages",
        "text": "plainText", "raw": "plainText", "completion": "plainText", "pretraining": "plainText", "dpo": "preference", "orpo": "preference",
        "pairwise": "preference", "kto": "unpairedPreference", "prompt": "promptOnly", "grpo": "promptOnly", "inputoutput": "promptCompletion",
        "multiplechoice": "mcq", "questionanswer": "qa",
    },
    "dataset.fileFormat": {"ndjson": "jsonl", "tsv": "csv", "text": "txt", "pq": "parquet"},
    "training.mixedPrecision": {
        "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "no", "fp32": "no", "none": "no", "true": "auto", "false": "no",
    },
    "training.gradientCheckpointing": {"true": "enabled", "false": "disabled", "yes": "enabled", "none": "disabled"},
    "training.scheduler": {
        "cosinewithhardrestarts": "cosineWithRestarts", "cosineannealing": "cosine", "cosineannealinglr": "cosine", "wsd": "warmupStableDecay",
    },
    "training.device": {"gpu": "cuda", "nvidia": "cuda", "cuda:0": "cuda"},
    "distributed.strategy": {
        "dp": "ddp", "distributeddataparallel": "ddp", "multigpu": "ddp", "fsdp2": "fsdp", "fullshard": "fsdp", "zero": "deepspeed",
        "single": "none", "false": "none",
    },
    "checkpoint.strategy": {"step": "steps", "epochs": "epoch", "none": "no", "never": "no", "false": "no"},
    "evaluation.strategy": {"step": "steps", "epochs": "epoch", "none": "no", "never": "no", "false": "no"},
    "evaluation.metrics": {"acc": "accuracy", "ppl": "perplexity", "rougel": "rouge"},
    "tracking.reportTo": {"tb": "tensorboard", "weightsandbiases": "wandb"},
    "storage.addressingStyle": {"virtualhosted": "virtual", "host": "virtual", "true": "path"},
    "output.export": {"huggingface": "safetensors", "pytorch": "safetensors"},
    "placement.tolerations[].operator": {"equals": "Equal", "=": "Equal", "==": "Equal", "exist": "Exists"},
    "placement.nodeAffinity[].operator": {"=": "In", "==": "In", "equal": "In", "equals": "In", "!=": "NotIn", ">": "Gt", "<": "Lt"},
    "evaluation.gates[].op": {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "min": "ge", "max": "le"},
    "encryption.type": {"aws:kms": "kms", "ssekms": "kms", "aes256": "s3", "sses3": "s3", "ssec": "customerKey"},
}  # fmt: skip
"""For each spec path, maps values that users often write to values of this API. These values are in lower case, without `_` and `-`; `true` and `false`
are YAML's booleans."""

OPTIMIZER_ALIASES: dict[str, str] = {
    "adam": "adamw_torch_fused", "adamw": "adamw_torch_fused", "adamw_hf": "adamw_torch_fused", "adamwtorch": "adamw_torch",
    "adam8bit": "adamw_8bit", "adamw8bit": "adamw_8bit", "pagedadamw": "paged_adamw_32bit", "pagedadam": "paged_adamw_32bit",
    "lion": "lion_32bit", "pagedlion": "paged_lion_32bit", "sgdm": "sgd", "momentum": "sgd",
}  # fmt: skip
"""Maps optimizer names of other tools to values of `training.optimizer`. The keys are in lower case."""


def normalise(name: str) -> str:
    """Return the name in lower case, without `_` and `-`."""
    return name.lower().replace("_", "").replace("-", "")


def find_field_for_alias(alias_path: str) -> str:
    """Return the spec path of the field that an option of another tool corresponds to: `training.learningRate` for `training.lr`.

    For an unknown name, return an empty string.
    """
    group, _, name = alias_path.rpartition(".")
    return FIELD_ALIASES.get(f"{group}.{normalise(name)}") or FIELD_ALIASES.get(normalise(name), "")
