"""All names that operator, trainer and CLI exchange: labels, environment variables, reasons, exit codes, paths.

Other modules import these names and do not repeat the strings.
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
CATEGORY = "finetune"
MAX_NAME_LENGTH = 40
NAME_PATTERN = "^[a-z]([-a-z0-9]*[a-z0-9])?$"

MANAGER = "finetune-operator"
"""Value of `app.kubernetes.io/managed-by` on every child, and the field manager of the operator's writes."""

RELEASE = "0.2.0"
"""Release of this package, and of the operator and the trainer that contain it."""
OLDEST_TRAINER = "0.1.0"
"""Oldest trainer release for which run.json is written."""
CONTRACT_VERSION = 2
"""Version of the contract between operator and pod. A change of run.json's structure increments it."""


class Origin(StrEnum):
    """Where a value of the resolved spec comes from."""

    USER = "user"
    """The user wrote it."""
    DEFAULT = "default"
    """The default of the field."""
    PLAN = "plan"
    """The operator chose it for this job."""
    PLATFORM = "platform"
    """The operator's configuration."""


class Label(StrEnum):
    """Labels on the objects that the operator creates."""

    MANAGED_BY = "app.kubernetes.io/managed-by"
    """Always `finetune-operator`; the operator's watches select by it."""
    NAME = f"{GROUP}/name"
    """Name of the FineTuneJob that the object belongs to."""
    UID = f"{GROUP}/uid"
    """uid of the FineTuneJob that the object belongs to. A later FineTuneJob of the same name has another uid."""
    ATTEMPT = f"{GROUP}/attempt"
    """Number of the attempt, counted from 1."""
    QUEUE = "kueue.x-k8s.io/queue-name"
    """Kueue's queue label, set from `placement.queueName`."""


class Annotation(StrEnum):
    """Annotations on the objects that the operator and the CLI create."""

    RUN_CONFIG = f"{GROUP}/run.json"
    """The whole run configuration; mounted into the pod as a file by the downward API."""
    RUN_CONFIG_SHA256 = f"{GROUP}/spec-sha256"
    """sha256 of the attempt's run configuration (run.json). The key says `spec` for compatibility with older releases."""
    RERUN_OF = f"{GROUP}/rerun-of"
    """On a FineTuneJob from `finetune rerun`: name and uid of the original job."""
    FROM_STEP = f"{GROUP}/from-step"
    """On a FineTuneJob from `finetune rerun`: optimizer step of the original job's checkpoint from which the rerun starts."""
    OBSERVED_VERSION = f"{GROUP}/observed-version"
    """On an event: resourceVersion of the FineTuneJob that caused the event. It distinguishes a second delivery of an event from a repetition."""


class Env(StrEnum):
    """Environment variables of the trainer container."""

    RUN_SHA256 = "FINETUNE_RUN_SHA256"
    """sha256 (hex) of the run configuration's bytes. If it does not match, the pod exits with 70."""
    NODE_RANK = "FINETUNE_NODE_RANK"
    """Rank of this pod among the job's pods: the completion index of the Indexed Job."""
    POD_NAME = "FINETUNE_POD_NAME"
    """Name of this pod."""
    POD_UID = "FINETUNE_POD_UID"
    """uid of this pod. The first eight hex digits of pod 0's uid are part of the incarnation's name in storage."""
    NODE_NAME = "FINETUNE_NODE_NAME"
    """Name of the node, for failure reports."""
    DISK_LIMIT = "FINETUNE_DISK_LIMIT_BYTES"
    """Limit of the pod's ephemeral storage, in bytes; absent in local runs."""
    RUN_FILE = "FINETUNE_RUN_FILE"
    """Path of the run configuration; default `/etc/finetune/run.json`."""
    WORK_DIR = "FINETUNE_WORK_DIR"
    """Writable scratch folder: downloads, staged checkpoints, logs; default `/work`."""
    TERMINATION_LOG = "FINETUNE_TERMINATION_LOG"
    """Path of the termination message; default `/dev/termination-log`."""
    PORT = "FINETUNE_PORT"
    """Port of the progress server; default 8080. 0: any free port (local runs)."""
    INCARNATION = "FINETUNE_INCARNATION"
    """Name of the incarnation's folder in storage, `a<attempt>-<8 hex>`. The supervisor sets it for its ranks."""
    FINAL_UPLOAD_TIMEOUT = "FINETUNE_FINAL_UPLOAD_TIMEOUT_SECONDS"
    """Seconds for which the upload of the final model is retried while the store is unavailable; default 1800."""
    UNSAVED_TIMEOUT = "FINETUNE_UNSAVED_TIMEOUT_SECONDS"
    """Seconds for which training may continue without a committed checkpoint while uploads to storage fail; default 21600."""
    HF_TOKEN = "HF_TOKEN"
    """Token for a model hub, from `model.tokenSecretRef`."""
    STORAGE_ACCESS_KEY = "AWS_ACCESS_KEY_ID"
    """From `storage.credentialsSecretRef`; with prefix MODEL_ or DATASET_ the variable belongs to `model.storage` or `dataset.storage`."""
    STORAGE_SECRET_KEY = "AWS_SECRET_ACCESS_KEY"
    """See STORAGE_ACCESS_KEY."""
    STORAGE_SESSION_TOKEN = "AWS_SESSION_TOKEN"
    """See STORAGE_ACCESS_KEY; optional in the Secret."""
    STORAGE_CUSTOMER_KEY = "AWS_SSE_CUSTOMER_KEY"
    """From `storage.encryption.customerKeySecretRef`, 32 bytes in base64; with the same prefixes as STORAGE_ACCESS_KEY."""


MODEL_CREDENTIALS_PREFIX = "MODEL_"
"""Prefix of the three AWS_ variables with the credentials of `model.storage.credentialsSecretRef`."""
DATASET_CREDENTIALS_PREFIX = "DATASET_"
"""Prefix of the three AWS_ variables with the credentials of `dataset.storage.credentialsSecretRef`."""

WANDB_KEY = "WANDB_API_KEY"
"""Variable with the value of `tracking.wandb.apiKeySecretRef`; a variable of this name in `placement.env` takes precedence."""
MONGODB_URI = "MONGODB_URI"
"""Variable with the value of `tracking.mongodb.uriSecretRef`; a variable of this name in `placement.env` takes precedence."""
HUB_TOKEN = "FINETUNE_HUB_TOKEN"
"""Variable with the token of `output.hub.tokenSecretRef`, which has write permission. The token of `model.tokenSecretRef` may be read-only."""

RUN_MOUNT = "/etc/finetune"
RUN_FILE_NAME = "run.json"
RUN_FILE = f"{RUN_MOUNT}/{RUN_FILE_NAME}"
MAX_RUN_BYTES = 64 * 1024
"""Maximum size of run.json in bytes: it is transported in an annotation."""
CONFIGMAP_MOUNT = "/etc/finetune-config"
"""ConfigMaps named by the spec are mounted at `<this>/<name>/`."""
PVC_MOUNT = "/mnt/pvc"
"""Claims named by `pvc://claim/path` are mounted at `<this>/<claim>/`."""
CA_MOUNT = "/etc/finetune-ca"
"""The bundle of `storage.caBundleRef` is mounted at `<this>/ca.crt`."""
WORK_MOUNT = "/work"
TERMINATION_LOG = "/dev/termination-log"
MAX_TERMINATION_BYTES = 4096
CONTAINER = "trainer"
"""Name of the trainer container in its pod."""
PROGRESS_PORT = 8080
PROGRESS_PORT_NAME = "progress"
RENDEZVOUS_PORT = 29400
"""Port of torchelastic's static rendezvous on rank 0's pod (several nodes only)."""
TRAINER_UID = 10001
"""User and group of the trainer and operator containers."""


class Path(StrEnum):
    """Paths of the supervisor's HTTP server."""

    PROGRESS = "/progress"
    METRICS = "/metrics"
    HEALTH = "/healthz"


class ExitCode(IntEnum):
    """How a pod ended. `finetune_api.exits` maps each code to its failure class and retry policy."""

    OK = 0
    """The final artefact is committed."""
    CONFIG = 64
    """The configuration cannot work; only another spec helps."""
    DATA = 65
    """The data cannot be trained on."""
    NOT_FOUND = 66
    """A model or data set is missing or gated."""
    STORAGE_SETUP = 67
    """Storage is wrongly configured: bucket, region, addressing, TLS."""
    STORAGE = 69
    """Storage could not be reached after retries."""
    INTERNAL = 70
    """Unclassified."""
    OUT_OF_MEMORY = 71
    """GPU memory was exhausted."""
    DIVERGED = 72
    """Loss or gradient norm was not finite."""
    NO_CHECKPOINT = 73
    """Checkpoints were committed, but none can be loaded."""
    PEER = 74
    """Another rank or a collective operation failed, or training hung."""
    PREEMPTED_SAVED = 75
    """Stopped on request; the state is saved."""
    PREEMPTED_UNSAVED = 76
    """Stopped on request; the state is not saved."""
    CREDENTIALS = 77
    """Credentials or permissions are missing or wrong."""
    INSTALLATION_BROKEN = 78
    """The trainer image lacks a compiler or library that the run needs."""
    TOO_OLD = 79
    """The trainer image is older than a field that the user set: the job waits for a newer image."""
    GATE_FAILED = 80
    """The trained model missed a gate in `evaluation.gates`; the model is kept."""
    KILLED = 137
    """Killed by SIGKILL. With reason OOMKilled: host memory was exhausted."""
    TERMINATED = 143
    """Ended by SIGTERM before a handler was installed."""


class FailureClass(StrEnum):
    """Kind of a failure; the first word of failure messages."""

    USER = "User"
    """The spec cannot work; only another spec helps."""
    DATA = "Data"
    """The data cannot be trained on."""
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
    """Unclassified, possibly a bug."""


class Phase(StrEnum):
    """One word for people. The operator derives the phase from the conditions and never reads it back. Programs should read conditions."""

    PENDING = "Pending"
    """The job has not started: it waits for resources or objects in the cluster."""
    VALIDATING = "Validating"
    """The spec, the model and the data are being checked."""
    QUEUED = "Queued"
    """The job waits for quota in a queue."""
    STARTING = "Starting"
    """Pods are being created, or they load the model."""
    RUNNING = "Running"
    """Optimizer steps are running."""
    RECOVERING = "Recovering"
    """An attempt ended; the next one starts or restores a checkpoint."""
    EVALUATING = "Evaluating"
    """The model is being evaluated."""
    UPLOADING = "Uploading"
    """The final artefact is being uploaded."""
    SUSPENDING = "Suspending"
    """spec.suspend is true; the pods save their state."""
    SUSPENDED = "Suspended"
    """spec.suspend is true; no pod is left."""
    CANCELLING = "Cancelling"
    """spec.cancel is true; the pods save their state."""
    CANCELLED = "Cancelled"
    """The job ended, because spec.cancel is true. Final."""
    SUCCEEDED = "Succeeded"
    """The final artefact is committed. Final."""
    FAILED = "Failed"
    """The job ended without the final artefact. Final."""


FINAL_PHASES = (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED)


class Condition(StrEnum):
    """Condition types of a FineTuneJob."""

    ACCEPTED = "Accepted"
    """The spec can be run as written."""
    QUOTA_RESERVED = "QuotaReserved"
    """Only with a queue: quota is reserved."""
    PODS_READY = "PodsReady"
    """All pods of the current attempt are ready."""
    SUSPENDED = "Suspended"
    """No pod exists, because spec.suspend is true."""
    CHECKPOINTS_HEALTHY = "CheckpointsHealthy"
    """Checkpoints are being committed and verified."""
    SUCCEEDED = "Succeeded"
    """The final artefact is committed."""
    FINISHED = "Finished"
    """No further attempt will be made."""
    RECONCILING = "Reconciling"
    """For kstatus: present and True while the operator or the pods are working."""
    STALLED = "Stalled"
    """For kstatus: present and True after a final failure, or when a person must act."""


class Reason(StrEnum):
    """Reasons in conditions, attempts and events: one word for programs."""

    # Acceptance
    ACCEPTED = "Accepted"
    """The spec passed every check that needs neither model nor data."""
    REJECTED = "Rejected"
    """A check refused the spec; the message names the field."""
    NOT_SUPPORTED_YET = "NotSupportedYet"
    """This release does not implement a field that the spec sets."""
    UNKNOWN_NODE_POOL = "UnknownNodePool"
    """`resources.nodePool` names no pool of the operator's configuration."""
    POOL_TOO_SMALL = "PoolTooSmall"
    """The spec requests more GPUs per node, or more nodes, than the pool has."""
    POOL_LACKS_RESOURCE = "PoolLacksResource"
    """The nodes of the pool do not have the resource `resources.gpuResource`."""
    OPERATOR_TOO_OLD = "OperatorTooOld"
    """The spec has a field or a value that this version of the operator does not know; the job waits for a newer operator."""
    SPEC_CHANGED = "SpecChanged"
    """The spec differs from the spec of the first attempt, usually because an older CRD removed a field; the job waits."""
    STORAGE_NOT_CONFIGURED = "StorageNotConfigured"
    """Neither the spec nor the operator's configuration sets storage.uri."""
    # Waiting
    QUEUED = "Queued"
    """The job waits for quota in a queue."""
    CHILDREN_CONFLICT = "ChildrenConflict"
    """A Job, Service or other object that the operator must create exists already and does not belong to the job."""
    QUOTA_EXCEEDED = "QuotaExceeded"
    """A resource quota refused the pods."""
    FORBIDDEN_BY_POLICY = "ForbiddenByPolicy"
    """An admission policy (Pod Security, a webhook) refused the pods."""
    JOB_REJECTED = "JobRejected"
    """The API server rejected the Job of an attempt. The spec is not the cause: the operator's configuration must change."""
    UNSCHEDULABLE = "Unschedulable"
    """The scheduler finds no node; the message contains the scheduler's explanation."""
    IMAGE_PULL_FAILED = "ImagePullFailed"
    """The image cannot be pulled."""
    CONFIG_MISSING = "ConfigMissing"
    """A Secret, ConfigMap or volume that the pod needs does not exist."""
    START_TIMEOUT = "StartTimeout"
    """`policy.startTimeoutSeconds` passed without all pods running."""
    # Running
    PROGRESSING = "Progressing"
    """The operator or the pods are working."""
    ATTEMPT_STARTED = "AttemptStarted"
    """A Job was created for an attempt."""
    TRAINING_STARTED = "TrainingStarted"
    """The first optimizer step was reported."""
    FIRST_CHECKPOINT_COMMITTED = "FirstCheckpointCommitted"
    """The first checkpoint is in storage."""
    RESUMED_FROM_CHECKPOINT = "ResumedFromCheckpoint"
    """An attempt continued from a committed checkpoint."""
    RETRYING = "Retrying"
    """Another attempt will be made."""
    PODS_READY = "PodsReady"
    """All pods are ready."""
    PODS_NOT_READY = "PodsNotReady"
    """Some pods are not ready yet."""
    CHECKPOINT_COMMITTED = "CheckpointCommitted"
    """The newest checkpoint is committed and healthy."""
    CHECKPOINT_DAMAGED = "CheckpointDamaged"
    """A committed checkpoint failed verification; an older one was used."""
    STAGING_DISK_FULL = "StagingDiskFull"
    """A checkpoint was skipped because the local disk was full."""
    CHECKPOINT_NOT_STORED = "CheckpointNotStored"
    """A checkpoint could not be staged or uploaded; training continues, and the previous checkpoint remains the newest."""
    STATUS_REJECTED = "StatusRejected"
    """The API server rejected the status. The operator writes it without the values that the pods reported, so that the job remains controllable."""
    # Ends of attempts and jobs
    PREEMPTED = "Preempted"
    """The cluster removed the pods; the attempt does not count against policy.retries."""
    GANG_INCOMPLETE = "GangIncomplete"
    """At the start timeout some pods of the attempt had nodes and others had none. The pods were deleted to free the nodes for another job."""
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
    """There were more consecutive attempts without progress than `policy.retries` allows."""
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    """`policy.activeDeadlineSeconds` passed."""
    USER_ERROR = "UserError"
    """The configuration cannot work."""
    DATA_ERROR = "DataError"
    """The data cannot be trained on."""
    MODEL_ERROR = "ModelError"
    """The model is missing, gated or unusable."""
    STORAGE_ERROR = "StorageError"
    """Object storage refused a request or could not be reached."""
    INTERNAL_ERROR = "InternalError"
    """Unclassified."""
    INSTALLATION_BROKEN = "InstallationBroken"
    """The trainer image lacks a compiler or library that the run needs."""
    TRAINER_TOO_OLD = "TrainerTooOld"
    """The trainer image does not know a field that the user set; the job waits for a newer image."""
    GATE_FAILED = "GateFailed"
    """The trained model missed a gate; the model is kept."""
    SUSPENDED = "Suspended"
    """`spec.suspend` is true and no pod is left."""
    SUSPENDING = "Suspending"
    """`spec.suspend` is true; the pods save their state."""
    RESUMED = "Resumed"
    """`spec.suspend` is false again."""
    CANCELLING = "Cancelling"
    """`spec.cancel` is true; the pods save their state."""
    CANCELLED = "Cancelled"
    """`spec.cancel` is true and no pod is left."""
    SUCCEEDED = "Succeeded"
    """The final artefact is committed."""
    FAILED = "Failed"
    """The job ended without the final artefact."""


class Storage(StrEnum):
    """Names of folders and objects below `<storage.uri>/<namespace>/<name>/<uid>/`."""

    CHECKPOINTS = "checkpoints"
    """Folder of all checkpoints, with one folder `step-<n>` per checkpoint."""
    MODEL = "model"
    """Folder of the final adapter or model."""
    METRICS = "metrics"
    """Folder of the training metrics."""
    EVALUATION = "evaluation"
    """Folder of evaluation results."""
    REPORT = "report"
    """Folder of the report of the run."""
    RUN = "run"
    """Folder with the configuration and the start marker of each attempt."""
    MANIFEST = "manifest.json"
    """In an incarnation's folder: size and sha256 of every file, and the state's step and metrics."""
    COMMITTED = "_COMMITTED"
    """Next to the incarnation folders, written last: JSON {attempt, path, manifestSha256}."""
    HEALTHY = "_HEALTHY"
    """In a checkpoint's folder, written when loss and gradients stayed finite in the steps after the checkpoint."""


def checkpoint_folder(step: int) -> str:
    """Return the folder name of a checkpoint. With eight digits, names sort in the order of steps."""
    return f"step-{step:08d}"


def incarnation(attempt: int, pod_uid: str) -> str:
    """Return the folder name of an incarnation, which is one run of an attempt's pod 0.

    `a<attempt>-<first 8 hex digits of the pod's uid>`. A fenced incarnation that still runs has another name, so it cannot overwrite
    the files of its successor.
    """
    digits = "".join(c for c in pod_uid.lower() if c in "0123456789abcdef")[:8]
    return f"a{attempt}-{digits:0<8}"


def attempt_of_uri(uri: str) -> int | None:
    """Return the attempt that wrote the checkpoint at `uri`; None if the URI does not end with an incarnation's folder."""
    prefix, _, digits = uri.rstrip("/").rpartition("/")[2].partition("-")
    number = prefix[1:]
    return int(number) if prefix[:1] == "a" and number.isdecimal() and len(digits) == 8 else None


def attempt_folder(attempt: int) -> str:
    """Return the name of the folder below `run/` that marks the start of an attempt."""
    return f"{_ATTEMPT_FOLDER}{attempt}"


def attempt_of_folder(name: str) -> int | None:
    """Return the attempt that a folder below `run/` belongs to, or None."""
    number = name.removeprefix(_ATTEMPT_FOLDER)
    return int(number) if number != name and number.isdecimal() else None


_ATTEMPT_FOLDER = "attempt-"


def attempt_job_name(name: str, attempt: int) -> str:
    """Return the name of an attempt's Job and Service."""
    return f"{name}-{attempt}"
