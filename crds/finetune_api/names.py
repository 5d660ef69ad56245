"""Names that operator, trainer and CLI share: labels, environment variables, reasons, exit codes, paths.

All other modules import these constants and do not repeat the strings.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum

GROUP = "finetune-operator.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
SINGULAR = "finetunejob"
SHORT_NAME = "ftj"
RESOURCE_CATEGORY = "finetune"
MAX_NAME_LENGTH = 40
NAME_PATTERN = "^[a-z]([-a-z0-9]*[a-z0-9])?$"

MANAGER_NAME = "finetune-operator"
"""Value of the label `app.kubernetes.io/managed-by` on the operator's objects, and name of the field manager of the operator's writes."""

RELEASE = "0.2.0"
"""Release of this package. Operator and trainer images that contain this package have the same release."""
OLDEST_TRAINER = "0.1.0"
"""Oldest trainer release that the operator supports. A job's `run.json` may require a newer trainer."""
CONTRACT_VERSION = 2
"""Version of the format of `run.json`. Every change of the format increments the version."""


class Origin(StrEnum):
    """Where a value in the resolved spec comes from."""

    USER = "user"
    """The user set the value."""
    DEFAULT = "default"
    """The value is the field's default."""
    PLAN = "plan"
    """The operator chose the value for this job."""
    PLATFORM = "platform"
    """The value comes from the operator's configuration."""


class Label(StrEnum):
    """Labels on the objects that the operator creates."""

    MANAGED_BY = "app.kubernetes.io/managed-by"
    """Always `finetune-operator`. The operator's watches use this label as their selector."""
    JOB_NAME = f"{GROUP}/name"
    """Name of the FineTuneJob that the object belongs to."""
    JOB_UID = f"{GROUP}/uid"
    """uid of the FineTuneJob that the object belongs to. A later FineTuneJob of the same name has another uid."""
    ATTEMPT = f"{GROUP}/attempt"
    """Number of the attempt; the first attempt has number 1. The Jobs and pods of a preparation have number 0."""
    QUEUE = "kueue.x-k8s.io/queue-name"
    """Kueue's queue label, set from `placement.queueName`."""
    CREATED_BY = f"{GROUP}/created-by"
    """On a FineTuneJob from `finetune serve-openai`: always `openai-server`. The server shows only jobs with this label."""


class Annotation(StrEnum):
    """Annotations on the objects that the operator and the CLI create."""

    RUN_CONFIG = f"{GROUP}/run.json"
    """Run configuration (`run.json`). The downward API mounts this annotation into the pod as a file."""
    RUN_CONFIG_SHA256 = f"{GROUP}/spec-sha256"
    """sha256 of the attempt's run configuration (`run.json`). The annotation key contains `spec` for compatibility with older releases."""
    ATTEMPT_SECRET = f"{GROUP}/attempt-secret"
    """On a Job: name of the Secret of the attempt. A Job without this annotation has no Secret for its attempt."""
    NETWORK_POLICY = f"{GROUP}/network-policy"
    """On a Job: name of the NetworkPolicy of the attempt. Jobs without this annotation have no NetworkPolicy."""
    RERUN_OF = f"{GROUP}/rerun-of"
    """On a FineTuneJob from `finetune rerun`: name and uid of the original job."""
    FROM_STEP = f"{GROUP}/from-step"
    """On a FineTuneJob from `finetune rerun`: optimizer step of the original job's checkpoint from which the new job starts."""
    OPENAI_REQUEST = f"{GROUP}/openai-request"
    """On a FineTuneJob from `finetune serve-openai`: the client's request as JSON."""


class Env(StrEnum):
    """Environment variables of the trainer container."""

    RUN_SHA256 = "FINETUNE_RUN_SHA256"
    """Expected sha256 (hex) of the file `run.json`. If the file has another sha256, the pod exits with code 70."""
    NODE_RANK = "FINETUNE_NODE_RANK"
    """Rank of this pod among the attempt's pods; equal to the completion index of the Indexed Job."""
    POD_NAME = "FINETUNE_POD_NAME"
    """Name of this pod."""
    POD_UID = "FINETUNE_POD_UID"
    """uid of this pod. The first eight hex digits of pod 0's uid are part of the incarnation's name in storage."""
    NODE_NAME = "FINETUNE_NODE_NAME"
    """Name of the pod's node, for failure reports."""
    CLAIM_CACHE = "FINETUNE_CLAIM_CACHE"
    """Only in preparation pods: the folder of the cache of base models in the PersistentVolumeClaim of `model.cache`."""
    DISK_LIMIT = "FINETUNE_DISK_LIMIT_BYTES"
    """Limit of the pod's ephemeral storage, in bytes. Not set in local runs."""
    RUN_FILE = "FINETUNE_RUN_FILE"
    """Path of the run configuration; default `/etc/finetune/run.json`."""
    ATTEMPT_SECRET_FILE = "FINETUNE_ATTEMPT_SECRET_FILE"
    """Path of the file with the secret of the attempt; default `/etc/finetune/attempt-secret`. Without the file, the pod works without a secret."""
    WORK_DIR = "FINETUNE_WORK_DIR"
    """Writable scratch folder for downloads, staged checkpoints and logs; default `/work`."""
    CONFIG_MAPS = "FINETUNE_CONFIG_MAPS"
    """Folder that contains one folder for each ConfigMap that the spec names; default `/etc/finetune-config`. Local runs set this variable."""
    TERMINATION_LOG = "FINETUNE_TERMINATION_LOG"
    """Path of the file for the termination message; default `/dev/termination-log`."""
    PORT = "FINETUNE_PORT"
    """Port of the progress server; default 8080. In local runs, the value is 0, and the progress server uses any free port."""
    INCARNATION_FOLDER = "FINETUNE_INCARNATION"
    """Name of the incarnation's folder in storage, `a<attempt>-<8 hex>`. The supervisor sets this variable for the ranks."""
    FINAL_UPLOAD_TIMEOUT_SECONDS = "FINETUNE_FINAL_UPLOAD_TIMEOUT_SECONDS"
    """If the store is unavailable, the trainer retries the upload of the final model for this many seconds; default 1800."""
    NO_COMMIT_TIMEOUT_SECONDS = "FINETUNE_UNSAVED_TIMEOUT_SECONDS"
    """If uploads of checkpoints fail, training stops after this many seconds without a committed checkpoint; default 21600."""
    EXPECTED_INPUTS = "FINETUNE_EXPECTED_INPUTS"
    """JSON with the expected revision of the base model and digests of the data, from `finetune replay`. If an input differs, the pod exits with code 64."""
    HF_TOKEN = "HF_TOKEN"
    """Token for a model hub, from `model.tokenSecretRef`."""
    STORAGE_ACCESS_KEY = "AWS_ACCESS_KEY_ID"
    """Access key from `storage.credentialsSecretRef`. With the prefix MODEL_ or DATASET_, the variable contains the key of `model.storage` or `dataset.storage`."""
    STORAGE_SECRET_KEY = "AWS_SECRET_ACCESS_KEY"
    """Secret key from the same Secret as STORAGE_ACCESS_KEY, with the same prefixes."""
    STORAGE_SESSION_TOKEN = "AWS_SESSION_TOKEN"
    """Session token from the same Secret as STORAGE_ACCESS_KEY, with the same prefixes. Not set if the Secret contains no session token."""
    STORAGE_CUSTOMER_KEY = "AWS_SSE_CUSTOMER_KEY"
    """Encryption key from `storage.encryption.customerKeySecretRef` (32 bytes in base64), with the same prefixes as STORAGE_ACCESS_KEY."""


MODEL_CREDENTIALS_PREFIX = "MODEL_"
"""Prefix of the AWS_ variables with the credentials from `model.storage.credentialsSecretRef`."""
DATASET_CREDENTIALS_PREFIX = "DATASET_"
"""Prefix of the AWS_ variables with the credentials from `dataset.storage.credentialsSecretRef`."""

WANDB_KEY = "WANDB_API_KEY"
"""Environment variable with the API key from `tracking.wandb.apiKeySecretRef`. A variable of the same name in `placement.env` takes precedence."""
MLFLOW_CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
"""Environment variables with the credentials of an MLflow server. Users set these variables in `placement.env`, from a Secret."""
WANDB_MODE = "WANDB_MODE"
"""Environment variable of W&B. If `placement.env` sets it to `offline`, the trainer writes files and does not connect to a server."""
MONGODB_URI = "MONGODB_URI"
"""Environment variable with the URI from `tracking.mongodb.uriSecretRef`. A variable of the same name in `placement.env` takes precedence."""
JUDGE_KEY = "OPENAI_API_KEY"
"""Environment variable with the API key from `evaluation.judge.apiKeySecretRef`. A variable of the same name in `placement.env` takes precedence."""
HUB_TOKEN = "FINETUNE_HUB_TOKEN"
"""Environment variable with the token from `output.hub.tokenSecretRef`. The hub token needs write permission, unlike the token of `model.tokenSecretRef`."""

RUN_MOUNT = "/etc/finetune"
RUN_FILE_NAME = "run.json"
RUN_FILE = f"{RUN_MOUNT}/{RUN_FILE_NAME}"
CHECK_STORAGE_COMMAND = "check-storage"
"""Command of the trainer image that checks whether a pod can write, read and list in storage. The argument of the command is a StoreTarget as JSON."""
ATTEMPT_SECRET_KEY = "attempt-secret"
"""Key of the Secret object that holds the secret of an attempt, and name of the file in `/etc/finetune` of the pods."""
ATTEMPT_SECRET_FILE = f"{RUN_MOUNT}/{ATTEMPT_SECRET_KEY}"
CHECKPOINT_KEY = "checkpoint-key"
"""Key of the Secret object that holds the signing key, and name of the file in `/etc/finetune` of the pods. The signing key signs the job's checkpoints or, in a preparation pod, the prepared rows of the namespace."""
MAX_RUN_BYTES = 64 * 1024
"""Maximum size of `run.json` in bytes. The operator stores `run.json` in an annotation, and Kubernetes limits the size of annotations."""
CONFIGMAP_MOUNT = "/etc/finetune-config"
"""Each ConfigMap that the spec names is mounted at `/etc/finetune-config/<name>/`."""
PVC_MOUNT = "/mnt/pvc"
"""The PersistentVolumeClaim of a URI `pvc://claim/path` is mounted at `/mnt/pvc/<claim>/`."""
MODEL_CACHE_MOUNT = "/mnt/model-cache"
"""Path at which the init container and a preparation pod mount the volume of `model.cache`.

If the cache is on a node, the trainer container mounts only the folder of its own namespace at this path, read-only.
"""
CLAIM_CACHE_TENANT = "models"
"""Tenant whose folder holds all models in a cache on a PersistentVolumeClaim. In a cache on a node, each namespace is a tenant with a folder of its own."""
MODEL_CACHE_CONTAINER = "model-cache"
"""Name of the init container that downloads the base model into the cache of `model.cache`."""
CA_MOUNT = "/etc/finetune-ca"
"""The CA bundle of `storage.caBundleRef` is mounted at `/etc/finetune-ca/ca.crt`."""
WORK_MOUNT = "/work"
TERMINATION_LOG = "/dev/termination-log"
MAX_TERMINATION_BYTES = 4096
TRAINER_CONTAINER = "trainer"
"""Name of the trainer container in its pod."""
GENERATION_CONTAINER = "generation"
"""Name of the container with the vLLM server, which generates the completions of grpo."""
GENERATION_PORT = 8100
"""Port of the vLLM server, which listens only on the loopback address of the pod."""
GENERATION_MOUNT = f"{WORK_MOUNT}/generation"
"""Folder on a volume that the trainer and the vLLM server share. The trainer writes the model's weights to this folder."""
GENERATION_MODEL_FOLDER = "model"
"""Folder below GENERATION_MOUNT with the model that the vLLM server reads."""
GENERATION_OPTIONS_FILE = "server.json"
"""File below GENERATION_MOUNT with the options of the vLLM server. The trainer writes this file last, because the server starts as soon as this file exists."""
GENERATION_END_FILE = "ended.json"
"""File below GENERATION_MOUNT that the server's container writes after the vLLM server has ended: JSON {message}."""
GENERATION_CONTRACT_VERSION = 1
"""Version of the format of GENERATION_OPTIONS_FILE and GENERATION_END_FILE."""
PROGRESS_PORT = 8080
PROGRESS_PORT_NAME = "progress"
PROGRESS_TOKEN_HEADER = "X-Finetune-Token"
"""HTTP header with the token of `GET /progress`. The API server, which forwards the request, uses the header `Authorization` itself."""
RENDEZVOUS_PORT = 29400
"""Port on the pod of rank 0 through which the pods of a job find each other (torch.distributed's rendezvous)."""
TRAINER_UID = 10001
"""User ID and group ID of the trainer and operator containers."""


class HttpPath(StrEnum):
    """Paths of the supervisor's HTTP server."""

    PROGRESS = "/progress"
    METRICS = "/metrics"
    HEALTH = "/healthz"
    USAGE = "/usage"
    """Current use of memory and GPUs, for `finetune top`."""


class ExitCode(IntEnum):
    """Exit codes of the trainer container. `finetune_api.exits` maps each exit code to a failure class and a retry policy."""

    OK = 0
    """Success: the final model is committed to storage."""
    CONFIG_INVALID = 64
    """The configuration cannot work. The user must change the spec."""
    DATA_INVALID = 65
    """The data cannot be used for training."""
    SOURCE_NOT_FOUND = 66
    """A model or data set is missing or gated."""
    STORAGE_SETUP = 67
    """Storage is wrongly configured: bucket, region, addressing, TLS."""
    STORAGE_UNREACHABLE = 69
    """Storage could not be reached, even after retries."""
    INTERNAL_ERROR = 70
    """The failure belongs to no other class, for example an unexpected exception."""
    OUT_OF_MEMORY = 71
    """GPU memory was exhausted."""
    TRAINING_DIVERGED = 72
    """Loss or gradient norm was not finite."""
    NO_CHECKPOINT = 73
    """The job has committed checkpoints, but none of them can be loaded."""
    PEER_FAILED = 74
    """Another rank or a collective operation failed, or training hung."""
    PREEMPTED_SAVED = 75
    """The pod was asked to stop, and saved a checkpoint."""
    PREEMPTED_UNSAVED = 76
    """The pod was asked to stop, but could not save a checkpoint."""
    CREDENTIALS_REFUSED = 77
    """Credentials are missing or wrong, or lack a permission."""
    INSTALLATION_BROKEN = 78
    """The trainer image lacks a compiler or a library that the run needs, or the pod has no GPU driver."""
    TRAINER_TOO_OLD = 79
    """The trainer image does not know a field that the user set. The job waits for a newer trainer image."""
    GATE_FAILED = 80
    """The trained model failed a gate in `evaluation.gates`. The model is kept in storage."""
    VERIFICATION_FAILED = 81
    """The stored final model is damaged, or differs from the trained model. The files are kept in storage."""
    SIGKILL = 137
    """SIGKILL ended the container. If the container's reason is OOMKilled, host memory was exhausted."""
    SIGTERM = 143
    """SIGTERM ended the container before the trainer installed its signal handler."""


class FailureClass(StrEnum):
    """Kind of failure. Failure messages start with this word."""

    USER = "User"
    """The spec cannot work. The user must change the spec."""
    DATA = "Data"
    """The data cannot be used for training."""
    MODEL = "Model"
    """The model is missing, gated or unusable."""
    STORAGE = "Storage"
    """Object storage refused a request or could not be reached."""
    OUT_OF_MEMORY = "OutOfMemory"
    """GPU or host memory was exhausted."""
    DIVERGED = "Diverged"
    """Loss or gradients were not finite."""
    PREEMPTED = "Preempted"
    """The cluster removed the pods."""
    INFRASTRUCTURE = "Infrastructure"
    """A node, a peer, the network or the installation failed."""
    INTERNAL = "Internal"
    """The failure belongs to no other class and may be a bug."""


class Phase(StrEnum):
    """Summary of the conditions in one word, for people. Programs should read the conditions. The operator never uses the phase as input."""

    PENDING = "Pending"
    """The job has not started: it waits for resources or objects in the cluster."""
    PREPARING = "Preparing"
    """A pod without GPUs checks storage, model and data before the first attempt."""
    VALIDATING = "Validating"
    """The spec, the model and the data are being checked."""
    QUEUED = "Queued"
    """The job waits for quota in a queue."""
    STARTING = "Starting"
    """Pods are being created, or pods are loading the model."""
    RUNNING = "Running"
    """The model is being trained."""
    RECOVERING = "Recovering"
    """An attempt ended. The next attempt is starting, or is restoring a checkpoint."""
    EVALUATING = "Evaluating"
    """The model is being evaluated."""
    UPLOADING = "Uploading"
    """The final model is being merged or uploaded, or the run's report is being written."""
    SUSPENDING = "Suspending"
    """`spec.suspend` is true, and the pods are saving a checkpoint."""
    SUSPENDED = "Suspended"
    """`spec.suspend` is true, and all pods have ended."""
    CANCELLING = "Cancelling"
    """The pods are saving a checkpoint before the job ends: `spec.cancel` is true, or `policy.activeDeadlineSeconds` or `policy.maxCost` is exceeded."""
    CANCELLED = "Cancelled"
    """The job ended because `spec.cancel` is true. This phase is final."""
    SUCCEEDED = "Succeeded"
    """The final model is committed to storage. This phase is final."""
    FAILED = "Failed"
    """The job ended without success. This phase is final."""


FINAL_PHASES = (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED)


class Condition(StrEnum):
    """Condition types of a FineTuneJob."""

    ACCEPTED = "Accepted"
    """The spec passed every check that needs neither model nor data."""
    PREPARED = "Prepared"
    """A pod without GPUs has checked storage, model and data. This condition exists only for jobs with a preparation."""
    QUOTA_RESERVED = "QuotaReserved"
    """The queue has reserved quota for the job. This condition exists only for jobs with a queue."""
    PODS_READY = "PodsReady"
    """All pods of the current attempt are ready."""
    SUSPENDED = "Suspended"
    """No pods exist, because `spec.suspend` is true."""
    CHECKPOINTS_HEALTHY = "CheckpointsHealthy"
    """The newest checkpoint is committed, and no checkpoint is damaged."""
    TRACKERS_REACHABLE = "TrackersReachable"
    """The trackers of `tracking.reportTo` accept the metrics of the run. This condition exists only for running jobs with trackers. A tracker never delays a job."""
    SUCCEEDED = "Succeeded"
    """The final model is committed to storage."""
    FINISHED = "Finished"
    """The job has ended, and the operator starts no further attempt."""
    RECONCILING = "Reconciling"
    """For tools that use kstatus, such as Argo CD and Flux: present and True while the operator or the pods are working."""
    STALLED = "Stalled"
    """For tools that use kstatus, such as Argo CD and Flux: present and True after a final failure, or if a person must act."""


class Reason(StrEnum):
    """Reasons in conditions, attempts and events. Programs may compare reasons."""

    # Acceptance
    ACCEPTED = "Accepted"
    """The spec passed every check that needs neither model nor data."""
    REJECTED = "Rejected"
    """A check refused the spec. The condition's message names the field."""
    NOT_SUPPORTED_YET = "NotSupportedYet"
    """This release does not implement a field that the spec sets."""
    UNKNOWN_NODE_POOL = "UnknownNodePool"
    """`resources.nodePool` names no pool of the operator's configuration."""
    PRICE_UNKNOWN = "PriceUnknown"
    """The spec sets `policy.maxCost`, but the node pool has no price. The job waits."""
    POOL_TOO_SMALL = "PoolTooSmall"
    """The spec requests more nodes than the pool has, or more GPUs per node."""
    POOL_LACKS_RESOURCE = "PoolLacksResource"
    """The nodes of the pool do not have the resource `resources.gpuResource`."""
    GENERATION_IMAGE_NOT_CONFIGURED = "GenerationImageNotConfigured"
    """The spec requests a vLLM server, but neither the spec nor the operator's configuration sets the image of this server."""
    OPERATOR_TOO_OLD = "OperatorTooOld"
    """This operator release does not know a field or a value of the spec. The job waits for a newer operator."""
    SPEC_CHANGED = "SpecChanged"
    """The spec differs from the spec of the first attempt, usually because an older CRD removed a field. The job waits until the spec is restored."""
    STORAGE_NOT_CONFIGURED = "StorageNotConfigured"
    """Neither the spec nor the operator's configuration sets storage.uri."""
    # Preparation
    PREPARING = "Preparing"
    """A pod without GPUs checks storage, model and data."""
    PREPARED = "Prepared"
    """The preparation pod has checked storage, model and data. The first attempt can start."""
    PREPARATION_SKIPPED = "PreparationSkipped"
    """The preparation pod got no node or could not run. The training pods check storage, model and data at their start."""
    EXISTING_RESULT_ADOPTED = "ExistingResultAdopted"
    """Storage holds the result of an earlier FineTuneJob with the same name, spec and inputs. The job succeeded with this result, without training."""
    # Waiting
    QUEUED = "Queued"
    """The job waits for quota in a queue."""
    CHILDREN_CONFLICT = "ChildrenConflict"
    """The operator cannot create a Job, Service or other object: an object of this name exists and does not belong to the FineTuneJob."""
    QUOTA_EXCEEDED = "QuotaExceeded"
    """A resource quota refused the pods."""
    FORBIDDEN_BY_POLICY = "ForbiddenByPolicy"
    """The platform's rules (`policy` in the chart's values) refused the spec, or an admission policy (Pod Security, a webhook) refused the pods."""
    JOB_REJECTED = "JobRejected"
    """The API server rejected the Job of an attempt. An administrator must change the operator's configuration; the spec is not the cause."""
    UNSCHEDULABLE = "Unschedulable"
    """The scheduler finds no node for a pod. The condition's message contains the scheduler's explanation."""
    IMAGE_PULL_FAILED = "ImagePullFailed"
    """The trainer image cannot be pulled."""
    CONFIG_MISSING = "ConfigMissing"
    """The pod needs a Secret, ConfigMap or volume that does not exist."""
    START_TIMEOUT = "StartTimeout"
    """After `policy.startTimeoutSeconds`, some pods were still not running."""
    # Running
    PROGRESSING = "Progressing"
    """The operator or the pods are working."""
    ATTEMPT_STARTED = "AttemptStarted"
    """A Job was created for an attempt."""
    TRAINING_STARTED = "TrainingStarted"
    """The pods reported the first optimizer step."""
    FIRST_CHECKPOINT_COMMITTED = "FirstCheckpointCommitted"
    """The first checkpoint is in storage."""
    RESUMED_FROM_CHECKPOINT = "ResumedFromCheckpoint"
    """An attempt continued from a committed checkpoint."""
    RETRYING = "Retrying"
    """The operator will start another attempt."""
    PODS_READY = "PodsReady"
    """All pods are ready."""
    PODS_NOT_READY = "PodsNotReady"
    """Some pods are not ready yet."""
    CHECKPOINT_COMMITTED = "CheckpointCommitted"
    """The newest checkpoint is committed and healthy."""
    CHECKPOINT_DAMAGED = "CheckpointDamaged"
    """A committed checkpoint failed verification. Training resumed from an older checkpoint."""
    STAGING_DISK_FULL = "StagingDiskFull"
    """A checkpoint was skipped because the local disk was full."""
    CHECKPOINT_NOT_STORED = "CheckpointNotStored"
    """A checkpoint could not be staged or uploaded. Training continues, and the previous checkpoint remains the newest."""
    # Trackers
    TRACKERS_REACHABLE = "TrackersReachable"
    """The trackers accept the metrics of the run."""
    TRACKER_UNAVAILABLE = "TrackerUnavailable"
    """A tracker does not answer. Training continues, and the trainer sends the metrics when the tracker answers again."""
    TRACKER_CREDENTIALS_REJECTED = "TrackerCredentialsRejected"
    """A tracker does not accept the credentials."""
    TRACKER_FAILED = "TrackerFailed"
    """A tracker refuses a request, or the process that sends metrics to the trackers has ended."""
    STATUS_REJECTED = "StatusRejected"
    """The API server rejected the status. After such a rejection, the operator writes the status without the values that the pods reported."""
    # Reasons for the end of an attempt or a job
    PREEMPTED = "Preempted"
    """The cluster removed the pods. The attempt does not count against `policy.retries`."""
    GANG_INCOMPLETE = "GangIncomplete"
    """When the start timeout passed, only some pods of the attempt had nodes. The operator deleted these pods to free the nodes for other jobs."""
    NODE_LOST = "NodeLost"
    """The node of a pod disappeared."""
    OUT_OF_MEMORY = "OutOfMemory"
    """GPU or host memory was exhausted."""
    DIVERGED = "Diverged"
    """Loss or gradient norm was not finite."""
    STALLED = "Stalled"
    """No optimizer step completed within the stall timeout."""
    PEER_FAILED = "PeerFailed"
    """Another rank or a collective operation failed."""
    RETRIES_EXHAUSTED = "RetriesExhausted"
    """The number of consecutive attempts without progress exceeded `policy.retries`."""
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    """The job ran longer than `policy.activeDeadlineSeconds`."""
    BUDGET_EXCEEDED = "BudgetExceeded"
    """The job has spent `policy.maxCost`, or the lower bound of its planned cost is already above `policy.maxCost`."""
    USER_ERROR = "UserError"
    """The configuration cannot work."""
    DATA_ERROR = "DataError"
    """The data cannot be used for training."""
    MODEL_ERROR = "ModelError"
    """The model is missing, gated or unusable."""
    STORAGE_ERROR = "StorageError"
    """Object storage refused a request or could not be reached."""
    INTERNAL_ERROR = "InternalError"
    """The failure fits none of the other reasons and may be a bug."""
    INSTALLATION_BROKEN = "InstallationBroken"
    """The trainer image lacks a compiler or a library that the run needs, or the pod has no GPU driver."""
    TRAINER_TOO_OLD = "TrainerTooOld"
    """The trainer image does not know a field that the user set. The job waits for a newer trainer image."""
    GATE_FAILED = "GateFailed"
    """The trained model failed a gate of `evaluation.gates`. The model is kept in storage."""
    MERGE_FAILED = "MergeFailed"
    """The adapter could not be merged into the base model, even after retries. The adapter is kept in storage."""
    EVALUATION_FAILED = "EvaluationFailed"
    """The metrics of `evaluation.metrics` could not be computed, even after retries. The trained model is kept in storage."""
    COMPARISON_FAILED = "ComparisonFailed"
    """The answers of the base model and the trained model could not be compared, even after retries. The trained model is kept in storage."""
    BENCHMARK_FAILED = "BenchmarkFailed"
    """A benchmark of `evaluation.benchmarks` could not run, even after retries. The trained model is kept in storage."""
    VERIFICATION_FAILED = "VerificationFailed"
    """The stored final model could not be loaded, or differs from the trained model. The files are kept in storage."""
    REPORT_FAILED = "ReportFailed"
    """The run's report could not be written, even after retries. The trained model is kept in storage."""
    SUSPENDED = "Suspended"
    """`spec.suspend` is true, and all pods have ended."""
    SUSPENDING = "Suspending"
    """`spec.suspend` is true, and the pods are saving a checkpoint."""
    RESUMED = "Resumed"
    """The user set `spec.suspend` to false again."""
    CANCELLING = "Cancelling"
    """`spec.cancel` is true, and the pods are saving a checkpoint."""
    CANCELLED = "Cancelled"
    """`spec.cancel` is true, and all pods have ended."""
    SUCCEEDED = "Succeeded"
    """The final model is committed to storage."""
    FAILED = "Failed"
    """The job ended without success."""


class Storage(StrEnum):
    """Names of folders and objects below `<storage.uri>/<namespace>/<name>/<uid>/`."""

    CHECKPOINTS = "checkpoints"
    """Folder of all checkpoints, with one folder `step-<n>` per checkpoint."""
    MODEL = "model"
    """Folder of the final adapter or model."""
    MERGED = "merged"
    """Folder of the model in which the adapter is merged into the base model, with `output.mergeAdapter`."""
    METRICS = "metrics"
    """Folder of the training metrics."""
    EVALUATION = "evaluation"
    """Folder of evaluation results."""
    REPORT = "report"
    """Folder of the run's report."""
    SERVING = "serving"
    """Folder of the manifests for the servers in `output.serving`, and of the OCI artefact in `oci/`."""
    LINEAGE = "lineage"
    """Folder of the lineage statement and its signature."""
    RUN = "run"
    """Folder with the run configuration and the start marker of each attempt."""
    MANIFEST = "manifest.json"
    """File in each incarnation's folder: size and sha256 of every file, optimizer step, and metrics."""
    SIGNATURE = "manifest.hmac"
    """File next to the manifest of a checkpoint or of prepared rows, with the manifest's signature (hex). The job's own key signs checkpoints, and the namespace's key signs prepared rows. Absent without `isolation.secret`."""
    COMMITTED = "_COMMITTED"
    """Marker of a committed checkpoint, next to the incarnation folders and written last: JSON {attempt, path, manifestSha256}."""
    HEALTHY = "_HEALTHY"
    """Marker in a checkpoint's folder. The trainer writes this marker if loss and gradients stay finite in the steps after the checkpoint."""
    PROMOTED = "_PROMOTED"
    """Marker in the folder `model`, next to `_COMMITTED`. The trainer writes this marker if the final model passes every gate of `evaluation.gates`."""


PREPARED_FOLDER = "_prepared"
"""Folder below `<storage.uri>/<namespace>/` with the prepared rows of the namespace, in one folder `<digest>` for each data set. No job has a folder of this name, because names of jobs cannot contain an underscore."""
USED_MARKER = "_USED"
"""Marker in a folder of prepared rows: JSON {until}.

The rows are kept until this time. Each preparation that uses the rows sets a later time, and so does the first pod of each attempt that uses the rows.
"""
RESULT_KEY = f"{Storage.RUN}/result.json"
"""Object below the job's folder that the trainer writes after a successful run: the result, and the spec and inputs from which it was made."""
ADAPTER_SHA256 = "adapterSha256"
"""Name of an entry in `extra` of a merged model's manifest: sha256 (hex) of the manifest of the merged adapter."""

REPORT_KEY = f"{Storage.REPORT}/index.html"
"""Path of the run's report below `<storage.uri>/<namespace>/<name>/<uid>/`: an HTML page that loads no other files."""


def checkpoint_folder(step: int) -> str:
    """Return the name of a checkpoint's folder, with the step in eight digits, so that the names sort in the order of the steps."""
    return f"step-{step:08d}"


def make_incarnation_folder_name(attempt: int, pod_uid: str) -> str:
    """Return the name of an incarnation's folder: `a<attempt>-<first 8 hex digits of the pod's uid>`.

    An incarnation is one run of an attempt's pod 0. If the Job replaces this pod, the new pod is another incarnation and writes to
    another folder. An old pod that still runs can therefore not overwrite the files of the new pod.
    """
    uid_digits = "".join(character for character in pod_uid.lower() if character in "0123456789abcdef")[:8]
    return f"a{attempt}-{uid_digits:0<8}"


def parse_attempt_of_uri(uri: str) -> int | None:
    """Return the number of the attempt that wrote the checkpoint or model at `uri`, or None if the URI does not end with an incarnation's folder."""
    attempt_part, _, uid_digits = uri.rstrip("/").rpartition("/")[2].partition("-")
    attempt_text = attempt_part[1:]
    return int(attempt_text) if attempt_part[:1] == "a" and attempt_text.isdecimal() and len(uid_digits) == 8 else None


def make_attempt_folder_name(attempt: int) -> str:
    """Return the name of an attempt's folder below `run/`. This folder marks the start of the attempt."""
    return f"{_ATTEMPT_FOLDER_PREFIX}{attempt}"


def parse_attempt_of_folder(folder_name: str) -> int | None:
    """Return the attempt number in the name of a folder below `run/`, or None if the folder belongs to no attempt."""
    attempt_text = folder_name.removeprefix(_ATTEMPT_FOLDER_PREFIX)
    return int(attempt_text) if attempt_text != folder_name and attempt_text.isdecimal() else None


_ATTEMPT_FOLDER_PREFIX = "attempt-"


PREPARATION_ATTEMPT = 0
"""The labels, progress reports and Secrets of a preparation contain this number as the attempt number."""


def make_prepared_rows_uri(job_root: str) -> str:
    """Return the URI of the folder with the prepared rows of a job's namespace. `job_root`: `<storage.uri>/<namespace>/<name>/<uid>`."""
    return f"{job_root.rstrip('/').rsplit('/', 2)[0]}/{PREPARED_FOLDER}"


def make_preparation_job_name(name: str, preparation: int) -> str:
    """Return the name of a preparation's Job. `name`: name of the FineTuneJob. `preparation`: number of the preparation, from 1.

    There is no hyphen before the number, unlike in the name of an attempt's Job. The Job of a preparation of `x` therefore never has the
    same name as the Job of an attempt of `x-prepare`.
    """
    return f"{name}-prepare{preparation}"


def parse_preparation_number(job_name: str, name: str) -> int | None:
    """Return the number of the preparation in the name of its Job, or None if the Job is not a preparation of the FineTuneJob `name`."""
    number_text = job_name.removeprefix(make_preparation_job_name(name, 0)[:-1])
    return int(number_text) if number_text != job_name and number_text.isdecimal() else None


def attempt_job_name(name: str, attempt: int) -> str:
    """Return the name of an attempt's Job, which is also the name of its Service. `name`: name of the FineTuneJob."""
    return f"{name}-{attempt}"
