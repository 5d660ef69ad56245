"""Every enumeration of the spec. The docstring below each member becomes part of the CRD's descriptions and of the reference pages."""

from __future__ import annotations

from enum import StrEnum


class AddressingStyle(StrEnum):
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
    AUTO = "auto"
    """bfloat16 on GPUs that support bfloat16. float32 on CPU and for methods that train base weights."""
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


class AttentionImplementation(StrEnum):
    AUTO = "auto"
    """PyTorch's variable-length attention (varlen) for SFT on a GPU that supports it, otherwise sdpa. With varlen, batches of several rows are concatenated instead of padded."""
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
    """Train virtual key and value vectors in front of each attention layer."""
    PROMPT_TUNING = "promptTuning"
    """Train virtual tokens in front of the input."""
    IA3 = "ia3"
    """Train scales on keys, values and MLP activations."""


class LoraBias(StrEnum):
    NONE = "none"
    """The biases of the model are not trained."""
    ALL = "all"
    """All biases of the model are trained."""
    LORA_ONLY = "loraOnly"
    """The biases of modules with an adapter are trained."""


class LoraInit(StrEnum):
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
    CAUSAL_LM = "causalLM"
    """Causal language modelling: predict the next token."""


class SpectrumMetric(StrEnum):
    MARCHENKO_PASTUR = "marchenkoPastur"
    """Singular values above the Marchenko-Pastur bound count as signal. Modules are ranked among modules of the same kind."""
    MEAN_OVER_STD = "meanOverStd"
    """mean(|W|) / std(W) of the weights. Whole layers are ranked."""


class TrainerType(StrEnum):
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
    TRANSFORMERS = "transformers"
    """The trainer generates the completions itself."""
    VLLM = "vllm"
    """A vLLM server generates the completions, in a second container of the pod with its own GPUs."""


class TrainerBackend(StrEnum):
    TRANSFORMERS = "transformers"
    """Standard implementation, for CPU and any number of GPUs."""
    UNSLOTH = "unsloth"
    """Implementation for one GPU that needs less GPU memory: Liger kernels, activations in host memory, 8-bit paged optimizer."""


class DpoLoss(StrEnum):
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
    """DPO for data with some swapped labels. labelSmoothing is the assumed fraction of pairs with swapped labels."""
    BCO_PAIR = "bcoPair"
    """Binary classifier optimisation."""
    APO_ZERO = "apoZero"
    """Anchored preference optimisation: raises the likelihood of the preferred answer and lowers the likelihood of the rejected answer."""
    APO_DOWN = "apoDown"
    """Anchored preference optimisation: lowers the likelihood of the preferred answer, and lowers the likelihood of the rejected answer more."""
    SFT = "sft"
    """Supervised loss on the preferred answer."""


class GrpoLoss(StrEnum):
    GRPO = "grpo"
    """Mean over the tokens of each completion, then mean over the completions."""
    BNPO = "bnpo"
    """Mean over all tokens of the local batch."""
    DR_GRPO = "drGrpo"
    """Sum over all tokens, divided by the maximum completion length. This loss has no length bias."""
    DAPO = "dapo"
    """Mean over all tokens of the global batch."""


class BuiltinReward(StrEnum):
    CITATION_FORMAT = "citationFormat"
    """1 if the completion is one `<cited_answer>` block with an answer and citations; otherwise 0."""
    THINK_FORMAT = "thinkFormat"
    """1 if the completion is one `<think>` block followed by an answer; otherwise 0."""
    REGEX = "regex"
    """1 if the completion matches parameters.pattern; otherwise 0."""
    EXACT_MATCH = "exactMatch"
    """1 if the completion equals the answer column of the row; otherwise 0."""
    LENGTH = "length"
    """1 if the length is between parameters.minimum and parameters.maximum. The reward of other lengths falls linearly and is 0 at length 0 and at twice the maximum."""
    JSON_SCHEMA = "jsonSchema"
    """1 if the completion is JSON that matches parameters.schema. parameters.parsed if the completion is any other JSON. 0 if the completion is not JSON."""


class DatasetFormat(StrEnum):
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
    """A column `input_ids` with token ids. `labels`, `completion_mask` or `assistant_masks` mark the tokens of the loss. Since 0.2.0."""


class FileFormat(StrEnum):
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
    TRUNCATE = "truncate"
    """Truncate the row to the maximum length."""
    DROP = "drop"
    """Skip the row and count skipped rows."""
    FAIL = "fail"
    """End the job with an error message that contains the row's number."""


class BadRows(StrEnum):
    FAIL = "fail"
    """End the job with an error message that contains the row's number."""
    SKIP = "skip"
    """Skip the row and count skipped rows."""


class LearningRateSchedule(StrEnum):
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
    AUTO = "auto"
    """bf16 on GPUs that support bfloat16, fp16 on older GPUs, no on CPU."""
    NO = "no"
    """The forward pass uses the data type of the weights."""
    FP16 = "fp16"
    """float16 with loss scaling."""
    BF16 = "bf16"
    """bfloat16."""


class GradientCheckpointing(StrEnum):
    DISABLED = "disabled"
    """Keep all activations in GPU memory."""
    ENABLED = "enabled"
    """Recompute activations in the backward pass. Recomputation saves GPU memory and takes about a third more time."""
    UNSLOTH = "unsloth"
    """Recompute activations in the backward pass, and keep the inputs of the layers in host memory."""


class Device(StrEnum):
    AUTO = "auto"
    """GPU if the pod has a GPU, otherwise CPU."""
    CPU = "cpu"
    """CPU."""
    CUDA = "cuda"
    """NVIDIA or AMD GPU."""
    MPS = "mps"
    """Apple GPU. Only in local runs."""


class PrepareStrategy(StrEnum):
    AUTO = "auto"
    """A pod without GPUs prepares every job that trains on GPUs. If this pod gets no node within five minutes or cannot run, the job starts without it."""
    ALWAYS = "always"
    """A pod without GPUs prepares every job that trains. The job does not start before the preparation has succeeded."""
    NEVER = "never"
    """The training pods check spec, model and data at their start, while their GPUs are idle."""


class OnExistingResult(StrEnum):
    """What happens if storage already holds the result of an earlier FineTuneJob with the same namespace and name."""

    ADOPT = "adopt"
    """If the spec and the inputs are those of the earlier run, the job succeeds with its result, without a training pod. Otherwise the job trains into a new folder."""
    TRAIN = "train"
    """The job trains into a new folder. The earlier result is kept."""
    FAIL = "fail"
    """The job fails before a training pod starts, whether or not the spec and the inputs are those of the earlier run."""


class StrategyType(StrEnum):
    NONE = "none"
    """No distribution: the job has a single rank."""
    DDP = "ddp"
    """Distributed data parallel: every rank has the whole model."""
    FSDP = "fsdp"
    """Fully sharded data parallel: weights, gradients and optimizer state are sharded over the ranks."""
    DEEPSPEED = "deepspeed"
    """DeepSpeed ZeRO."""


class FsdpSharding(StrEnum):
    FULL_SHARD = "fullShard"
    """Weights, gradients and optimizer state are sharded."""
    SHARD_GRAD_OP = "shardGradOp"
    """Gradients and optimizer state are sharded. Weights are not resharded between forward and backward pass."""
    NO_SHARD = "noShard"
    """Weights, gradients and optimizer state are not sharded."""


class FsdpStateDict(StrEnum):
    FULL = "full"
    """One file. Rank 0 gathers the state of all ranks and writes the file."""
    SHARDED = "sharded"
    """One file per rank."""
    LOCAL = "local"
    """Not supported by FSDP version 2; the operator refuses this value."""


class IntervalStrategy(StrEnum):
    STEPS = "steps"
    """After every `steps` optimizer steps."""
    EPOCH = "epoch"
    """After each pass over the data."""
    NO = "no"
    """Never."""


class OutputLayout(StrEnum):
    PROJECT_MODEL_TIME = "projectModelTime"
    """`<project>/<model>/<YYYYMMDD_HHMMSS>/`, with the start time of the run in UTC. The final model is in the folder `model` there."""
    FLAT = "flat"
    """All files directly in output.dir. A later run overwrites them."""


class ExportFormat(StrEnum):
    SAFETENSORS = "safetensors"
    """Hugging Face safetensors."""
    OCI = "oci"
    """An OCI artefact (CNCF ModelPack) of the safetensors files, for container registries. Its manifest is stored beside the model, and `finetune export` writes the artefact."""
    GGUF = "gguf"
    """GGUF, the format of llama.cpp."""
    ONNX = "onnx"
    """ONNX graph."""


class ServingTarget(StrEnum):
    VLLM = "vllm"
    """The OpenAI-compatible server of vLLM. Adapters are served beside their base model."""
    KSERVE = "kserve"
    """KServe's Hugging Face runtime, which serves with vLLM."""


class EvaluationMetric(StrEnum):
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
    LT = "lt"
    """Less than `value`."""
    LE = "le"
    """At most `value`."""
    GT = "gt"
    """Greater than `value`."""
    GE = "ge"
    """At least `value`."""


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
    """Adapter weights, for use with the base model."""
    MODEL = "model"
    """A complete model."""
