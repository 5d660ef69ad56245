"""Option names of other tools, and the equivalent FineTuneJob fields. If a spec contains another tool's name, the error message suggests the field."""

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
    "usedora": "method.lora.useDora", "userslora": "method.lora.rankStabilized", "peft": "method.lora", "finetuningtype": "method.type",
    # data
    "data": "dataset.train", "datapath": "dataset.train", "datasetpath": "dataset.train", "trainfile": "dataset.train", "trainpath": "dataset.train",
    "traindata": "dataset.train", "trainingdata": "dataset.train", "trainingfile": "dataset.train", "dataset.path": "dataset.train",
    "dataset.name": "dataset.train", "dataset.source": "dataset.train", "valdata": "dataset.validation", "valpath": "dataset.validation",
    "evaldata": "dataset.validation", "evalpath": "dataset.validation", "validationfile": "dataset.validation", "evaldataset": "dataset.validation",
    "maxlength": "dataset.maxSequenceLength", "maxseqlength": "dataset.maxSequenceLength", "maxseqlen": "dataset.maxSequenceLength",
    "sequencelen": "dataset.maxSequenceLength", "cutofflen": "dataset.maxSequenceLength", "contextlength": "dataset.maxSequenceLength",
    "modelmaxlength": "dataset.maxSequenceLength", "samplepacking": "dataset.packing", "trainonresponsesonly": "dataset.responseOnly.enabled",
    # training
    "lr": "training.learningRate", "numepochs": "training.epochs", "nepochs": "training.epochs", "numtrainepochs": "training.epochs",
    "training.steps": "training.maxSteps", "batchsize": "training.batchSizePerDevice", "microbatchsize": "training.batchSizePerDevice",
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
    "loadbestmodelatend": "checkpoint.loadBestAtEnd", "logsteps": "tracking.loggingSteps", "wandb": "tracking.reportTo", "report": "tracking.reportTo",
    # cluster
    "gpu": "resources.gpusPerNode", "gpus": "resources.gpusPerNode", "numgpus": "resources.gpusPerNode", "ngpus": "resources.gpusPerNode",
    "gpucount": "resources.gpusPerNode", "nprocpernode": "resources.processesPerNode", "numnodes": "resources.nodes", "nnodes": "resources.nodes",
    "replicas": "resources.nodes", "workers": "resources.nodes", "numworkers": "resources.nodes", "cpus": "resources.cpu", "numcpus": "resources.cpu",
    "ram": "resources.memory", "mem": "resources.memory", "disk": "resources.ephemeralStorage", "shm": "resources.sharedMemory",
    "shmsize": "resources.sharedMemory", "zerostage": "distributed.deepspeed.zeroStage", "outputdir": "storage.uri", "bucket": "storage.uri",
    "queue": "placement.queueName", "localqueue": "placement.queueName", "timeout": "policy.activeDeadlineSeconds",
    "maxruntime": "policy.activeDeadlineSeconds", "maxretries": "policy.retries", "backofflimit": "policy.retries",
    "pushtohub": "output.hub.push", "hubmodelid": "output.hub.repository",
}  # fmt: skip
"""Maps option names of other tools to spec paths. Names are in lower case without `_` and `-`. A key `group.name` applies only in the group `group`."""

OPTIMIZER_ALIASES: dict[str, str] = {
    "adam": "adamw_torch_fused", "adamw": "adamw_torch_fused", "adamw_hf": "adamw_torch_fused", "adamwtorch": "adamw_torch",
    "adam8bit": "adamw_8bit", "adamw8bit": "adamw_8bit", "pagedadamw": "paged_adamw_32bit", "pagedadam": "paged_adamw_32bit",
    "lion": "lion_32bit", "pagedlion": "paged_lion_32bit", "sgdm": "sgd", "momentum": "sgd",
}  # fmt: skip
"""Maps optimizer names of other tools, in lower case, to values of `training.optimizer`."""


def normalise(name: str) -> str:
    """Return the name in lower case, without `_` and `-`."""
    return name.lower().replace("_", "").replace("-", "")


def field_for_alias(path: str) -> str:
    """Return the spec path for an option name of another tool: `training.learningRate` for `training.lr`. For unknown names, return an empty string."""
    group, _, name = path.rpartition(".")
    return FIELD_ALIASES.get(f"{group}.{normalise(name)}") or FIELD_ALIASES.get(normalise(name), "")
