"""Every enumeration of the spec. The docstring below a member explains the value. The CRD's descriptions and the reference pages contain this docstring."""

from __future__ import annotations

from enum import StrEnum


class AddressingStyle(StrEnum):
    PATH = "path"
    """`https://host/bucket/key`."""
    VIRTUAL = "virtual"
    """`https://bucket.host/key`."""


class EncryptionType(StrEnum):
    """Who holds the key for the encryption of stored objects."""

    S3 = "s3"
    """The store holds the key (SSE-S3)."""
    KMS = "kms"
    """The store's key management service holds the key (SSE-KMS)."""
    CUSTOMER_KEY = "customerKey"
    """You hold the key (SSE-C). The store keeps no copy of the key: if you lose the key, the objects cannot be read."""


class Dtype(StrEnum):
    AUTO = "auto"
    """bfloat16 on GPUs that support it; float32 on CPU and where the method trains whole weights."""
    FLOAT16 = "float16"
    """16 bits, IEEE half precision."""
    BFLOAT16 = "bfloat16"
    """16 bits with the value range of float32."""
    FLOAT32 = "float32"
    """32 bits."""


class ComputeDtype(StrEnum):
    BFLOAT16 = "bfloat16"
    """16 bits with the value range of float32."""
    FLOAT16 = "float16"
    """16 bits, IEEE half precision."""
    FLOAT32 = "float32"
    """32 bits."""


class Attention(StrEnum):
    AUTO = "auto"
    """The same as sdpa."""
    EAGER = "eager"
    """Plain PyTorch operations."""
    SDPA = "sdpa"
    """PyTorch's scaled_dot_product_attention."""
    FLASH_ATTENTION_2 = "flashAttention2"
    """The flash-attn package, version 2 (GPU only)."""


class QuantizationType(StrEnum):
    NF4 = "nf4"
    """4-bit normal float, made for normally distributed weights."""
    FP4 = "fp4"
    """4-bit float."""


class Modality(StrEnum):
    TEXT = "text"
    """A language model."""
    VISION_LANGUAGE = "visionLanguage"
    """A model for text and images."""


class MethodType(StrEnum):
    FULL = "full"
    """Train all weights."""
    LORA = "lora"
    """Train low-rank adapters; the base stays frozen."""
    QLORA = "qlora"
    """LoRA on a base that is loaded in 4 bits."""
    DORA = "dora"
    """LoRA that trains the magnitude and the direction of each weight separately."""
    ADAPTER = "adapter"
    """Continue the training of an existing LoRA adapter."""
    SPECTRUM = "spectrum"
    """Train the modules with the highest signal-to-noise ratio in full; freeze the others."""
    PREFIX_TUNING = "prefixTuning"
    """Train virtual key and value vectors in front of each attention layer."""
    PROMPT_TUNING = "promptTuning"
    """Train virtual tokens in front of the input."""
    IA3 = "ia3"
    """Train scales on keys, values and MLP activations."""


class LoraBias(StrEnum):
    NONE = "none"
    """No bias is trained."""
    ALL = "all"
    """All biases of the model are trained."""
    LORA_ONLY = "loraOnly"
    """The biases of modules with an adapter are trained."""


class LoraInit(StrEnum):
    DEFAULT = "default"
    """Matrix A is random (Kaiming uniform), matrix B is zero."""
    GAUSSIAN = "gaussian"
    """Matrix A is random (normal distribution), matrix B is zero."""
    PISSA = "pissa"
    """The principal singular vectors of the base weights."""
    OLORA = "olora"
    """An orthonormal basis of the base weights (QR decomposition)."""
    EVA = "eva"
    """The principal directions of activations on the training data."""
    LOFTQ = "loftq"
    """The best low-rank approximation of the error of a 4-bit base."""


class TaskType(StrEnum):
    CAUSAL_LM = "causalLM"
    """Causal language modelling: predict the next token."""


class SpectrumMetric(StrEnum):
    MARCHENKO_PASTUR = "marchenkoPastur"
    """Singular values above the Marchenko-Pastur bound are signal; modules of each kind are ranked."""
    MEAN_OVER_STD = "meanOverStd"
    """mean(|W|) / std(W); whole layers are ranked."""


class TrainerType(StrEnum):
    SFT = "sft"
    """Supervised fine-tuning on answers."""
    DPO = "dpo"
    """Direct preference optimisation on pairs of a preferred and a rejected answer."""
    GRPO = "grpo"
    """Group relative policy optimisation: reinforcement learning from reward functions."""
    KTO = "kto"
    """Kahneman-Tversky optimisation on single answers labelled good or bad."""
    ORPO = "orpo"
    """Odds ratio preference optimisation: preferences without a reference model."""
    REWARD = "reward"
    """Train a reward model that gives each answer a score."""


class Backend(StrEnum):
    TRANSFORMERS = "transformers"
    """The standard path, for any number of GPUs or CPU."""
    UNSLOTH = "unsloth"
    """The trainer's own memory-saving path for one GPU: Liger kernels, activations in host memory, 8-bit paged optimizer."""


class DpoLoss(StrEnum):
    SIGMOID = "sigmoid"
    """The loss of the DPO paper."""
    HINGE = "hinge"
    """Hinge loss on the likelihood ratio (SLiC)."""
    IPO = "ipo"
    """Squared loss that does not overfit deterministic preferences."""
    EXO_PAIR = "exoPair"
    """Exact optimisation with reverse KL; needs labelSmoothing above 0."""
    NCA_PAIR = "ncaPair"
    """Noise contrastive alignment."""
    ROBUST = "robust"
    """DPO for pairs that may be labelled the wrong way round; reads labelSmoothing."""
    BCO_PAIR = "bcoPair"
    """Binary classifier optimisation."""
    APO_ZERO = "apoZero"
    """Anchored preference optimisation: raises the likelihood of the preferred answer and lowers that of the rejected answer."""
    APO_DOWN = "apoDown"
    """Anchored preference optimisation: lowers the likelihood of both answers, that of the rejected answer more."""
    SFT = "sft"
    """Supervised loss on the preferred answer."""


class GrpoLoss(StrEnum):
    GRPO = "grpo"
    """Mean over the tokens of each completion, then over completions."""
    BNPO = "bnpo"
    """Mean over all tokens of the local batch."""
    DR_GRPO = "drGrpo"
    """Sum over tokens divided by the maximum completion length: no length bias."""
    DAPO = "dapo"
    """Mean over all tokens of the global batch."""


class BuiltinReward(StrEnum):
    CITATION_FORMAT = "citationFormat"
    """1 if the completion is one `<cited_answer>` block with an answer and citations, else 0."""
    THINK_FORMAT = "thinkFormat"
    """1 if the completion starts with one `<think>` block and continues after it, else 0."""
    REGEX = "regex"
    """1 if the completion matches parameters.pattern, else 0."""
    EXACT_MATCH = "exactMatch"
    """1 if the completion equals the row's answer column, else 0."""
    LENGTH = "length"
    """1 if the completion's length lies between parameters.minimum and parameters.maximum. Outside, the value falls linearly to 0 at length 0 and at twice the maximum."""
    JSON_SCHEMA = "jsonSchema"
    """1 if the completion is JSON that fits parameters.schema; parameters.parsed if the completion is other JSON; else 0."""


class DatasetFormat(StrEnum):
    PLAIN_TEXT = "plainText"
    """A column `text`, or lines of a text file; all tokens are learned."""
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
    """OpenAssistant message trees; the best-ranked path of each tree is learned."""
    MESSAGES = "messages"
    """A column `messages` with `role` and `content`."""
    PROMPT_COMPLETION = "promptCompletion"
    """Columns `prompt` and `completion`."""
    PROMPT_ONLY = "promptOnly"
    """A column `prompt`, for grpo; further columns are passed to the rewards."""
    PREFERENCE = "preference"
    """Columns `prompt`, `chosen` and `rejected`, for dpo, orpo and reward."""
    UNPAIRED_PREFERENCE = "unpairedPreference"
    """Columns `prompt`, `completion` and `label`, for kto."""
    CUSTOM = "custom"
    """Any columns, rendered with dataset.template; all tokens are learned."""


class FileFormat(StrEnum):
    AUTO = "auto"
    """The file extension decides."""
    JSONL = "jsonl"
    """One JSON object per line."""
    JSON = "json"
    """A JSON array, or an object whose `data` is an array."""
    CSV = "csv"
    """A header and values, separated by comma, semicolon or tab."""
    TXT = "txt"
    """One row per line."""
    PARQUET = "parquet"
    """Apache Parquet."""


class Overflow(StrEnum):
    TRUNCATE = "truncate"
    """Cut the row."""
    DROP = "drop"
    """Leave the row out and count it."""
    FAIL = "fail"
    """End the job with the row's number."""


class BadRows(StrEnum):
    FAIL = "fail"
    """End the job with the row's number."""
    SKIP = "skip"
    """Leave the row out and count it."""


class Scheduler(StrEnum):
    LINEAR = "linear"
    """Falls linearly to 0."""
    COSINE = "cosine"
    """Falls to 0 along a cosine."""
    COSINE_WITH_RESTARTS = "cosineWithRestarts"
    """Several cosines; each starts at the peak rate."""
    COSINE_WITH_MIN_LR = "cosineWithMinLr"
    """Falls along a cosine to a minimum rate."""
    POLYNOMIAL = "polynomial"
    """Falls along a polynomial."""
    CONSTANT = "constant"
    """Does not change."""
    CONSTANT_WITH_WARMUP = "constantWithWarmup"
    """Does not change after the warm-up."""
    INVERSE_SQRT = "inverseSqrt"
    """Falls with the inverse square root of the step."""
    WARMUP_STABLE_DECAY = "warmupStableDecay"
    """Stays at the peak, then decays in the last steps."""


class MixedPrecision(StrEnum):
    AUTO = "auto"
    """bf16 on GPUs that support it, fp16 on older GPUs, none on CPU."""
    NO = "no"
    """The forward pass uses the type of the weights."""
    FP16 = "fp16"
    """float16 with loss scaling."""
    BF16 = "bf16"
    """bfloat16."""


class GradientCheckpointing(StrEnum):
    DISABLED = "disabled"
    """Keep all activations in GPU memory."""
    ENABLED = "enabled"
    """Recompute activations in the backward pass: less memory, about a third more time."""
    UNSLOTH = "unsloth"
    """Recompute activations and keep their inputs in host memory."""


class Device(StrEnum):
    AUTO = "auto"
    """GPU if the pod has one, else CPU."""
    CPU = "cpu"
    """CPU."""
    CUDA = "cuda"
    """NVIDIA or AMD GPU."""
    MPS = "mps"
    """Apple GPU; only for local runs."""


class Strategy(StrEnum):
    NONE = "none"
    """One rank."""
    DDP = "ddp"
    """Distributed data parallel: every rank holds the whole model."""
    FSDP = "fsdp"
    """Fully sharded data parallel: ranks share the weights, gradients and optimizer state."""
    DEEPSPEED = "deepspeed"
    """DeepSpeed ZeRO."""


class FsdpSharding(StrEnum):
    FULL_SHARD = "fullShard"
    """Weights, gradients and optimizer state are sharded."""
    SHARD_GRAD_OP = "shardGradOp"
    """Gradients and optimizer state are sharded; weights stay whole between forward and backward pass."""
    NO_SHARD = "noShard"
    """Nothing is sharded, as with ddp."""


class FsdpStateDict(StrEnum):
    FULL = "full"
    """One file, gathered on rank 0."""
    SHARDED = "sharded"
    """One file per rank."""
    LOCAL = "local"
    """Refused: FSDP version 2 does not support local state dicts."""


class When(StrEnum):
    STEPS = "steps"
    """Every `steps` optimizer steps."""
    EPOCH = "epoch"
    """After each pass over the data."""
    NO = "no"
    """Never."""


class Layout(StrEnum):
    PROJECT_MODEL_TIME = "projectModelTime"
    """`<project>/<model>/<YYYYMMDD_HHMMSS>/`."""
    FLAT = "flat"
    """All files in one folder."""


class ExportFormat(StrEnum):
    SAFETENSORS = "safetensors"
    """Hugging Face safetensors."""
    GGUF = "gguf"
    """llama.cpp's format."""
    ONNX = "onnx"
    """ONNX graph."""


class Metric(StrEnum):
    ACCURACY = "accuracy"
    """Fraction of correct answers."""
    F1 = "f1"
    """Harmonic mean of precision and recall."""
    PRECISION = "precision"
    """Fraction of predicted positives that are correct."""
    RECALL = "recall"
    """Fraction of actual positives that are found."""
    PERPLEXITY = "perplexity"
    """exp of the mean loss per token."""
    BLEU = "bleu"
    """n-gram precision against the reference answer."""
    ROUGE = "rouge"
    """n-gram recall against the reference answer."""
    BERTSCORE = "bertscore"
    """Similarity of token embeddings."""
    SEMANTIC_SIMILARITY = "semanticSimilarity"
    """Cosine similarity of sentence embeddings."""
    FACTUAL_CORRECTNESS = "factualCorrectness"
    """Facts of the reference that the answer states, scored by a judge."""
    ANSWER_ACCURACY = "answerAccuracy"
    """Agreement with the reference, scored by a judge."""
    ANSWER_RELEVANCY = "answerRelevancy"
    """How well the answer fits the question, scored by a judge."""
    ANSWER_CORRECTNESS = "answerCorrectness"
    """Factual and semantic agreement with the reference, scored by a judge."""


class Tracker(StrEnum):
    WANDB = "wandb"
    """Weights & Biases."""
    TENSORBOARD = "tensorboard"
    """TensorBoard event files in the job's storage."""
    MLFLOW = "mlflow"
    """MLflow tracking server."""
    MONGODB = "mongodb"
    """A MongoDB collection."""


class OnOutOfMemory(StrEnum):
    ADAPT = "Adapt"
    """Retry with a smaller micro-batch and the same effective batch size."""
    FAIL = "Fail"
    """End the job."""


class OnDivergence(StrEnum):
    ROLLBACK = "Rollback"
    """Resume from an earlier healthy checkpoint with a lower learning rate."""
    FAIL = "Fail"
    """End the job."""


class OutputKind(StrEnum):
    ADAPTER = "adapter"
    """Adapter weights, to be used with the base model."""
    MODEL = "model"
    """A complete model."""
