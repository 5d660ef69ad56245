"""All enumerations of the spec. The docstring below each member becomes part of the CRD's descriptions and of the reference pages."""

from __future__ import annotations

from enum import StrEnum


class AddressingStyle(StrEnum):
    """Where the bucket's name is in URLs."""

    PATH = "path"
    """`https://host/bucket/key`."""
    VIRTUAL = "virtual"
    """`https://bucket.host/key`."""


class EncryptionType(StrEnum):
    """Owner of the key that encrypts stored objects."""

    S3 = "s3"
    """The store owns the key (SSE-S3)."""
    KMS = "kms"
    """The store's key management service owns the key (SSE-KMS)."""
    CUSTOMER_KEY = "customerKey"
    """The user owns the key (SSE-C). The store has no copy of the key, so the objects cannot be read without the key."""


class WeightDtype(StrEnum):
    """Data type of the loaded weights."""

    AUTO = "auto"
    """bfloat16 on GPUs that support it; float32 on CPU and for methods that train base weights."""
    FLOAT16 = "float16"
    """16 bits, IEEE half precision."""
    BFLOAT16 = "bfloat16"
    """16 bits with the value range of float32."""
    FLOAT32 = "float32"
    """32 bits."""


class ComputeDtype(StrEnum):
    """Data type in which quantised layers compute."""

    BFLOAT16 = "bfloat16"
    """16 bits with the value range of float32."""
    FLOAT16 = "float16"
    """16 bits, IEEE half precision."""
    FLOAT32 = "float32"
    """32 bits."""


class AttentionImplementation(StrEnum):
    """Implementation of the attention layers."""

    AUTO = "auto"
    """PyTorch's variable-length attention (varlen) for SFT on a GPU that supports it, otherwise sdpa. With varlen, the rows of a batch are concatenated and not padded."""
    EAGER = "eager"
    """Plain PyTorch operations."""
    SDPA = "sdpa"
    """PyTorch's scaled_dot_product_attention."""
    FLASH_ATTENTION_2 = "flashAttention2"
    """The flash-attn package, version 2 (GPU only)."""


class QuantizationType(StrEnum):
    """Number format of 4-bit weights."""

    NF4 = "nf4"
    """4-bit NormalFloat, a format for normally distributed weights."""
    FP4 = "fp4"
    """4-bit floating point."""


class Modality(StrEnum):
    """What the base model reads."""

    TEXT = "text"
    """A language model."""
    VISION_LANGUAGE = "visionLanguage"
    """A model for text and images."""


class MethodType(StrEnum):
    """Fine-tuning method."""

    FULL = "full"
    """Train all weights."""
    LORA = "lora"
    """Train low-rank adapters and freeze the base model."""
    QLORA = "qlora"
    """LoRA on a base model that is quantised to 4 bits."""
    DORA = "dora"
    """LoRA that trains the magnitude and the direction of each weight separately."""
    ADAPTER = "adapter"
    """Continue the training of an existing LoRA adapter."""
    SPECTRUM = "spectrum"
    """Fully train the modules with the highest signal-to-noise ratio, and freeze all other modules."""
    PREFIX_TUNING = "prefixTuning"
    """Train virtual key and value vectors in front of the keys and values of each attention layer."""
    PROMPT_TUNING = "promptTuning"
    """Train virtual tokens in front of the input."""
    IA3 = "ia3"
    """Train factors by which keys, values and MLP activations are multiplied."""


class LoraBias(StrEnum):
    """Which biases of the model are trained with LoRA."""

    NONE = "none"
    """The biases of the model are not trained."""
    ALL = "all"
    """All biases of the model are trained."""
    LORA_ONLY = "loraOnly"
    """The biases of modules with an adapter are trained."""


class LoraInit(StrEnum):
    """Initialisation of a LoRA adapter."""

    DEFAULT = "default"
    """Random matrix A (Kaiming uniform), zero matrix B."""
    GAUSSIAN = "gaussian"
    """Random matrix A (normal distribution), zero matrix B."""
    PISSA = "pissa"
    """Principal singular vectors of the base weights."""
    OLORA = "olora"
    """Orthonormal basis of the base weights (QR decomposition)."""
    EVA = "eva"
    """Principal directions of the activations on training data."""
    LOFTQ = "loftq"
    """Best low-rank approximation of the quantisation error of a 4-bit base model."""


class TaskType(StrEnum):
    """Task of the model."""

    CAUSAL_LM = "causalLM"
    """Causal language modelling: predict the next token."""


class SpectrumMetric(StrEnum):
    """How method spectrum computes the signal-to-noise ratio."""

    MARCHENKO_PASTUR = "marchenkoPastur"
    """Singular values above the Marchenko-Pastur bound count as signal. Each module is ranked among the modules of the same kind."""
    MEAN_OVER_STD = "meanOverStd"
    """mean(|W|) / std(W) of the weights W. Whole layers are ranked, not single modules."""


class TrainerType(StrEnum):
    """Training objective."""

    SFT = "sft"
    """Supervised fine-tuning."""
    DPO = "dpo"
    """Direct preference optimisation on pairs of a preferred and a rejected answer."""
    GRPO = "grpo"
    """Group relative policy optimisation: reinforcement learning with reward functions."""
    KTO = "kto"
    """Kahneman-Tversky optimisation on single answers with the label good or bad."""
    ORPO = "orpo"
    """Odds ratio preference optimisation: learns preferences without a reference model."""
    REWARD = "reward"
    """Train a reward model that gives each answer a score."""


class GenerationBackend(StrEnum):
    """Program that generates the completions of grpo."""

    TRANSFORMERS = "transformers"
    """The trainer generates the completions itself."""
    VLLM = "vllm"
    """A vLLM server generates the completions, in a second container of the pod with its own GPUs."""


class TrainerBackend(StrEnum):
    """Implementation of the training loop."""

    TRANSFORMERS = "transformers"
    """Standard implementation, for CPU and any number of GPUs."""
    UNSLOTH = "unsloth"
    """Implementation for one GPU that needs less GPU memory: Liger kernels, activations in host memory, 8-bit paged optimizer."""


class DpoLoss(StrEnum):
    """Loss function of dpo."""

    SIGMOID = "sigmoid"
    """Loss of the original DPO paper."""
    HINGE = "hinge"
    """Hinge loss of the likelihood ratio (SLiC)."""
    IPO = "ipo"
    """Identity preference optimisation: squared loss that reduces overfitting."""
    EXO_PAIR = "exoPair"
    """Efficient exact optimisation with reverse KL divergence. This loss needs labelSmoothing above 0."""
    NCA_PAIR = "ncaPair"
    """Noise contrastive alignment."""
    ROBUST = "robust"
    """DPO for data in which some pairs have swapped labels. labelSmoothing is the assumed fraction of these pairs."""
    BCO_PAIR = "bcoPair"
    """Binary classifier optimisation."""
    APO_ZERO = "apoZero"
    """Anchored preference optimisation: raises the likelihood of the preferred answer and lowers the likelihood of the rejected answer."""
    APO_DOWN = "apoDown"
    """Anchored preference optimisation: lowers the likelihood of both answers, and that of the rejected answer more."""
    SFT = "sft"
    """Supervised loss on the preferred answer."""


class GrpoLoss(StrEnum):
    """How grpo averages the losses of the tokens."""

    GRPO = "grpo"
    """Mean over the tokens of each completion, then mean over the completions."""
    BNPO = "bnpo"
    """Mean over all tokens of the local batch."""
    DR_GRPO = "drGrpo"
    """Sum over all tokens, divided by the maximum completion length. This loss has no length bias."""
    DAPO = "dapo"
    """Mean over all tokens of the global batch."""


class BuiltinReward(StrEnum):
    """Built-in reward function of grpo."""

    CITATION_FORMAT = "citationFormat"
    """1 if the completion is one `<cited_answer>` block with an answer and citations; otherwise 0."""
    THINK_FORMAT = "thinkFormat"
    """1 if the completion is one `<think>` block followed by an answer; otherwise 0."""
    REGEX = "regex"
    """1 if the completion matches parameters.pattern; otherwise 0."""
    EXACT_MATCH = "exactMatch"
    """1 if the completion equals the answer column of the row; otherwise 0."""
    LENGTH = "length"
    """1 if the length is between parameters.minimum and parameters.maximum. Outside this range, the reward falls linearly, to 0 at length 0 and at twice the maximum."""
    JSON_SCHEMA = "jsonSchema"
    """1 if the completion is JSON that matches parameters.schema; the value of parameters.parsed if it is other JSON; 0 if it is not JSON."""


class DatasetFormat(StrEnum):
    """Format of the rows of a data set."""

    PLAIN_TEXT = "plainText"
    """A column `text`, or the lines of a text file. The loss includes all tokens."""
    MCQ = "mcq"
    """Columns `question`, `options` and `answer` (multiple choice)."""
    INSTRUCTION = "instruction"
    """Columns `instruction` and `response`."""
    QA = "qa"
    """Columns `question`, `answer` and optionally `context`."""
    ALPACA = "alpaca"
    """Columns `instruction`, `input` and `output`."""
    SHAREGPT = "sharegpt"
    """A column `conversations` with `from` and `value`."""
    OASST = "oasst"
    """OpenAssistant message trees. Training uses the best-ranked path of each tree."""
    MESSAGES = "messages"
    """A column `messages` with `role` and `content`."""
    PROMPT_COMPLETION = "promptCompletion"
    """Columns `prompt` and `completion`."""
    PROMPT_ONLY = "promptOnly"
    """A column `prompt`, for grpo. Reward functions get all other columns."""
    PREFERENCE = "preference"
    """Columns `prompt`, `chosen` and `rejected`, for dpo, orpo and reward."""
    UNPAIRED_PREFERENCE = "unpairedPreference"
    """Columns `prompt`, `completion` and `label`, for kto."""
    CUSTOM = "custom"
    """Any columns, rendered with dataset.template. The loss includes all tokens."""
    PRE_TOKENIZED = "preTokenized"
    """A column `input_ids` with token ids. A column `labels`, `completion_mask` or `assistant_masks` says for which tokens the loss is computed. Since 0.2.0."""


class FileFormat(StrEnum):
    """Type of a data file."""

    AUTO = "auto"
    """The file extension decides the file type."""
    JSONL = "jsonl"
    """One JSON object per line."""
    JSON = "json"
    """A JSON array, or a JSON object with an array `data`."""
    CSV = "csv"
    """A header line and lines of values, separated by comma, semicolon or tab."""
    TXT = "txt"
    """One row per line."""
    PARQUET = "parquet"
    """Apache Parquet."""


class OverflowPolicy(StrEnum):
    """What happens with rows that are longer than the maximum length."""

    TRUNCATE = "truncate"
    """Truncate the row to the maximum length."""
    DROP = "drop"
    """Skip the row. The number of skipped rows is reported."""
    FAIL = "fail"
    """End the job with an error message that contains the row's number."""


class BadRows(StrEnum):
    """What happens with rows that cannot be used for training."""

    FAIL = "fail"
    """End the job with an error message that contains the row's number."""
    SKIP = "skip"
    """Skip the row. The number of skipped rows is reported."""


class LearningRateSchedule(StrEnum):
    """Schedule of the learning rate."""

    LINEAR = "linear"
    """The learning rate falls linearly to 0."""
    COSINE = "cosine"
    """The learning rate falls to 0 along a cosine."""
    COSINE_WITH_RESTARTS = "cosineWithRestarts"
    """The learning rate falls along several cosines. Each cosine starts at the peak rate."""
    COSINE_WITH_MIN_LR = "cosineWithMinLr"
    """The learning rate falls along a cosine to a minimum rate."""
    POLYNOMIAL = "polynomial"
    """The learning rate falls along a polynomial."""
    CONSTANT = "constant"
    """The learning rate is constant and has no warm-up."""
    CONSTANT_WITH_WARMUP = "constantWithWarmup"
    """The learning rate is constant after the warm-up."""
    INVERSE_SQRT = "inverseSqrt"
    """The learning rate is proportional to the inverse square root of the step."""
    WARMUP_STABLE_DECAY = "warmupStableDecay"
    """The learning rate stays at the peak and decays in the last steps."""


class MixedPrecision(StrEnum):
    """Data type of the forward pass."""

    AUTO = "auto"
    """`bf16` on GPUs that support bfloat16, `fp16` on older GPUs, `no` on CPU."""
    NO = "no"
    """The forward pass uses the data type of the weights."""
    FP16 = "fp16"
    """float16 with loss scaling."""
    BF16 = "bf16"
    """bfloat16."""


class GradientCheckpointing(StrEnum):
    """Whether activations are recomputed in the backward pass."""

    DISABLED = "disabled"
    """Keep all activations in GPU memory."""
    ENABLED = "enabled"
    """Recompute activations in the backward pass. Recomputation saves GPU memory and takes about a third more time."""
    UNSLOTH = "unsloth"
    """Recompute activations in the backward pass, and keep the inputs of the layers in host memory."""


class Device(StrEnum):
    """Device to train on."""

    AUTO = "auto"
    """GPU if the pod has a GPU, otherwise CPU."""
    CPU = "cpu"
    """CPU."""
    CUDA = "cuda"
    """NVIDIA or AMD GPU."""
    MPS = "mps"
    """Apple GPU. Only in local runs."""


class PrepareStrategy(StrEnum):
    """Whether a pod without GPUs prepares the job before its first attempt."""

    AUTO = "auto"
    """A pod without GPUs prepares every job that trains on GPUs. If this pod gets no node within five minutes, or cannot run, the job starts without a preparation."""
    ALWAYS = "always"
    """A pod without GPUs prepares every job that trains. The job does not start before the preparation has succeeded."""
    NEVER = "never"
    """The training pods check spec, model and data at their start, while their GPUs are idle."""


class OnExistingResult(StrEnum):
    """What happens if storage already holds the result of an earlier FineTuneJob with the same namespace and name."""

    ADOPT = "adopt"
    """If spec and inputs equal those of the earlier run, the job succeeds with the earlier result, without a training pod. If the spec or the inputs differ, the job trains into a new folder."""
    TRAIN = "train"
    """The job trains into a new folder. The earlier result is kept."""
    FAIL = "fail"
    """The job fails before a training pod starts, even if spec and inputs equal those of the earlier run."""


class StrategyType(StrEnum):
    """Distributed strategy."""

    NONE = "none"
    """No distribution: the job has a single rank."""
    DDP = "ddp"
    """Distributed data parallel: every rank has the whole model."""
    FSDP = "fsdp"
    """Fully sharded data parallel: weights, gradients and optimizer state are sharded over the ranks."""
    DEEPSPEED = "deepspeed"
    """DeepSpeed ZeRO."""


class FsdpSharding(StrEnum):
    """Which tensors FSDP shards over the ranks."""

    FULL_SHARD = "fullShard"
    """Weights, gradients and optimizer state are sharded."""
    SHARD_GRAD_OP = "shardGradOp"
    """Gradients and optimizer state are sharded. Each rank keeps the whole weights between forward and backward pass."""
    NO_SHARD = "noShard"
    """Weights, gradients and optimizer state are not sharded."""


class FsdpStateDict(StrEnum):
    """Format of the optimizer state in FSDP checkpoints."""

    FULL = "full"
    """One file. Rank 0 gathers the state of all ranks and writes the file."""
    SHARDED = "sharded"
    """One file per rank."""
    LOCAL = "local"
    """The operator refuses this value, because FSDP version 2 does not support it."""


class IntervalStrategy(StrEnum):
    """When checkpoints are saved, or evaluations run."""

    STEPS = "steps"
    """After every `steps` optimizer steps."""
    EPOCH = "epoch"
    """After each pass over the data."""
    NO = "no"
    """Never."""


class OutputLayout(StrEnum):
    """Structure of the folders below `output.dir`."""

    PROJECT_MODEL_TIME = "projectModelTime"
    """`<project>/<model>/<YYYYMMDD_HHMMSS>/`, with the start time of the run in UTC. The final model is in the folder `model` below this folder."""
    FLAT = "flat"
    """All files are directly in output.dir. A later run overwrites the files."""


class ExportFormat(StrEnum):
    """Format of the final model."""

    SAFETENSORS = "safetensors"
    """Hugging Face safetensors."""
    OCI = "oci"
    """An OCI artefact (CNCF ModelPack) of the safetensors files, for container registries. The job stores the artefact's manifest next to the model, and `finetune export` writes the artefact."""
    GGUF = "gguf"
    """GGUF, the format of llama.cpp."""
    ONNX = "onnx"
    """ONNX graph."""


class ServingTarget(StrEnum):
    """Server that must be able to serve the final model."""

    VLLM = "vllm"
    """The OpenAI-compatible server of vLLM. The server serves an adapter together with its base model."""
    KSERVE = "kserve"
    """KServe's Hugging Face runtime, which serves with vLLM."""


class EvaluationMetric(StrEnum):
    """Metric that is computed after training."""

    ACCURACY = "accuracy"
    """Fraction of correct answers."""
    F1 = "f1"
    """Harmonic mean of precision and recall."""
    PRECISION = "precision"
    """Fraction of predicted positives that are correct."""
    RECALL = "recall"
    """Fraction of actual positives that are predicted as positive."""
    PERPLEXITY = "perplexity"
    """exp of the mean loss per token."""
    BLEU = "bleu"
    """n-gram precision of the answer with respect to the reference answer."""
    ROUGE = "rouge"
    """n-gram recall of the answer with respect to the reference answer."""
    BERTSCORE = "bertscore"
    """Similarity of the token embeddings of answer and reference answer."""
    SEMANTIC_SIMILARITY = "semanticSimilarity"
    """Cosine similarity of the sentence embeddings of answer and reference answer."""
    FACTUAL_CORRECTNESS = "factualCorrectness"
    """A judge model scores how many facts of the reference answer the answer contains."""
    ANSWER_ACCURACY = "answerAccuracy"
    """A judge model scores the agreement with the reference answer."""
    ANSWER_RELEVANCY = "answerRelevancy"
    """A judge model scores the relevance of the answer to the question."""
    ANSWER_CORRECTNESS = "answerCorrectness"
    """A judge model scores the factual and semantic agreement with the reference answer."""


class GateMetric(StrEnum):
    """The metrics of `EvaluationMetric`, and the loss."""

    LOSS = "loss"
    """Mean loss per token, in nats; lower is better."""
    PERPLEXITY = "perplexity"
    """exp of the mean loss per token; lower is better."""
    ACCURACY = "accuracy"
    """Fraction of correct answers."""
    F1 = "f1"
    """Harmonic mean of precision and recall."""
    PRECISION = "precision"
    """Fraction of predicted positives that are correct."""
    RECALL = "recall"
    """Fraction of actual positives that are predicted as positive."""
    BLEU = "bleu"
    """n-gram precision of the answers."""
    ROUGE = "rouge"
    """n-gram recall of the answers."""
    BERTSCORE = "bertscore"
    """Similarity of the answers' token embeddings."""
    SEMANTIC_SIMILARITY = "semanticSimilarity"
    """Cosine similarity of the answers' sentence embeddings."""
    FACTUAL_CORRECTNESS = "factualCorrectness"
    """The judge's score for the facts of the answers."""
    ANSWER_ACCURACY = "answerAccuracy"
    """The judge's score for the agreement with the reference answers."""
    ANSWER_RELEVANCY = "answerRelevancy"
    """The judge's score for the relevance of the answers."""
    ANSWER_CORRECTNESS = "answerCorrectness"
    """The judge's score for the factual and semantic agreement with the reference answers."""


class GateOperator(StrEnum):
    """How a gate compares its metric with `value`."""

    LT = "lt"
    """Less than `value`."""
    LE = "le"
    """At most `value`."""
    GT = "gt"
    """Greater than `value`."""
    GE = "ge"
    """At least `value`."""


class Tracker(StrEnum):
    """Tracker that receives the metrics of a run."""

    WANDB = "wandb"
    """Weights & Biases."""
    TENSORBOARD = "tensorboard"
    """TensorBoard event files in the job's storage."""
    MLFLOW = "mlflow"
    """MLflow tracking server."""
    MONGODB = "mongodb"
    """A MongoDB collection."""


class OnOutOfMemory(StrEnum):
    """What the operator does after GPU memory was exhausted."""

    ADAPT = "Adapt"
    """Start another attempt with a smaller micro-batch and the same effective batch size."""
    FAIL = "Fail"
    """End the job."""


class OnDivergence(StrEnum):
    """What the operator does after the loss or a gradient was not finite."""

    ROLLBACK = "Rollback"
    """Resume from an earlier healthy checkpoint with a lower learning rate."""
    FAIL = "Fail"
    """End the job."""


class OutputKind(StrEnum):
    """Kind of final model."""

    ADAPTER = "adapter"
    """Adapter weights, for use with the base model."""
    MODEL = "model"
    """A complete model."""
