"""Every enumeration of the spec: the words a user may write."""

from __future__ import annotations

from enum import StrEnum


class AddressingStyle(StrEnum):
    PATH = "path"
    VIRTUAL = "virtual"


class EncryptionType(StrEnum):
    """Who holds the key that objects at rest are encrypted with."""

    S3 = "s3"
    KMS = "kms"
    CUSTOMER_KEY = "customerKey"


class Dtype(StrEnum):
    AUTO = "auto"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class ComputeDtype(StrEnum):
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Attention(StrEnum):
    AUTO = "auto"
    EAGER = "eager"
    SDPA = "sdpa"
    FLASH_ATTENTION_2 = "flashAttention2"


class QuantizationType(StrEnum):
    NF4 = "nf4"
    FP4 = "fp4"


class Modality(StrEnum):
    TEXT = "text"
    VISION_LANGUAGE = "visionLanguage"


class MethodType(StrEnum):
    FULL = "full"
    LORA = "lora"
    QLORA = "qlora"
    DORA = "dora"
    ADAPTER = "adapter"
    SPECTRUM = "spectrum"
    PREFIX_TUNING = "prefixTuning"
    PROMPT_TUNING = "promptTuning"
    IA3 = "ia3"


class LoraBias(StrEnum):
    NONE = "none"
    ALL = "all"
    LORA_ONLY = "loraOnly"


class LoraInit(StrEnum):
    DEFAULT = "default"
    GAUSSIAN = "gaussian"
    PISSA = "pissa"
    OLORA = "olora"
    EVA = "eva"
    LOFTQ = "loftq"


class TaskType(StrEnum):
    CAUSAL_LM = "causalLM"


class SpectrumMetric(StrEnum):
    MARCHENKO_PASTUR = "marchenkoPastur"
    MEAN_OVER_STD = "meanOverStd"


class TrainerType(StrEnum):
    SFT = "sft"
    DPO = "dpo"
    GRPO = "grpo"
    KTO = "kto"
    ORPO = "orpo"
    REWARD = "reward"


class Backend(StrEnum):
    TRANSFORMERS = "transformers"
    UNSLOTH = "unsloth"


class DpoLoss(StrEnum):
    SIGMOID = "sigmoid"
    HINGE = "hinge"
    IPO = "ipo"
    EXO_PAIR = "exoPair"
    NCA_PAIR = "ncaPair"
    ROBUST = "robust"
    BCO_PAIR = "bcoPair"
    APO_ZERO = "apoZero"
    APO_DOWN = "apoDown"
    SFT = "sft"


class GrpoLoss(StrEnum):
    GRPO = "grpo"
    BNPO = "bnpo"
    DR_GRPO = "drGrpo"
    DAPO = "dapo"


class BuiltinReward(StrEnum):
    CITATION_FORMAT = "citationFormat"
    THINK_FORMAT = "thinkFormat"
    REGEX = "regex"
    EXACT_MATCH = "exactMatch"
    LENGTH = "length"
    JSON_SCHEMA = "jsonSchema"


class DatasetFormat(StrEnum):
    PLAIN_TEXT = "plainText"
    MCQ = "mcq"
    INSTRUCTION = "instruction"
    QA = "qa"
    ALPACA = "alpaca"
    SHAREGPT = "sharegpt"
    OASST = "oasst"
    MESSAGES = "messages"
    PROMPT_COMPLETION = "promptCompletion"
    PROMPT_ONLY = "promptOnly"
    PREFERENCE = "preference"
    UNPAIRED_PREFERENCE = "unpairedPreference"
    CUSTOM = "custom"


class FileFormat(StrEnum):
    AUTO = "auto"
    JSONL = "jsonl"
    JSON = "json"
    CSV = "csv"
    TXT = "txt"
    PARQUET = "parquet"


class Overflow(StrEnum):
    TRUNCATE = "truncate"
    DROP = "drop"
    FAIL = "fail"


class BadRows(StrEnum):
    FAIL = "fail"
    SKIP = "skip"


class Scheduler(StrEnum):
    LINEAR = "linear"
    COSINE = "cosine"
    COSINE_WITH_RESTARTS = "cosineWithRestarts"
    COSINE_WITH_MIN_LR = "cosineWithMinLr"
    POLYNOMIAL = "polynomial"
    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constantWithWarmup"
    INVERSE_SQRT = "inverseSqrt"
    WARMUP_STABLE_DECAY = "warmupStableDecay"


class MixedPrecision(StrEnum):
    AUTO = "auto"
    NO = "no"
    FP16 = "fp16"
    BF16 = "bf16"


class GradientCheckpointing(StrEnum):
    DISABLED = "disabled"
    ENABLED = "enabled"
    UNSLOTH = "unsloth"


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"


class Strategy(StrEnum):
    NONE = "none"
    DDP = "ddp"
    FSDP = "fsdp"
    DEEPSPEED = "deepspeed"


class FsdpSharding(StrEnum):
    FULL_SHARD = "fullShard"
    SHARD_GRAD_OP = "shardGradOp"
    NO_SHARD = "noShard"


class FsdpStateDict(StrEnum):
    FULL = "full"
    SHARDED = "sharded"
    LOCAL = "local"


class When(StrEnum):
    STEPS = "steps"
    EPOCH = "epoch"
    NO = "no"


class Layout(StrEnum):
    PROJECT_MODEL_TIME = "projectModelTime"
    FLAT = "flat"


class ExportFormat(StrEnum):
    SAFETENSORS = "safetensors"
    GGUF = "gguf"
    ONNX = "onnx"


class Metric(StrEnum):
    ACCURACY = "accuracy"
    F1 = "f1"
    PRECISION = "precision"
    RECALL = "recall"
    PERPLEXITY = "perplexity"
    BLEU = "bleu"
    ROUGE = "rouge"
    BERTSCORE = "bertscore"
    SEMANTIC_SIMILARITY = "semanticSimilarity"
    FACTUAL_CORRECTNESS = "factualCorrectness"
    ANSWER_ACCURACY = "answerAccuracy"
    ANSWER_RELEVANCY = "answerRelevancy"
    ANSWER_CORRECTNESS = "answerCorrectness"


class Tracker(StrEnum):
    WANDB = "wandb"
    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"
    MONGODB = "mongodb"


class OnOutOfMemory(StrEnum):
    ADAPT = "Adapt"
    FAIL = "Fail"


class OnDivergence(StrEnum):
    ROLLBACK = "Rollback"
    FAIL = "Fail"


class OutputKind(StrEnum):
    ADAPTER = "adapter"
    MODEL = "model"
