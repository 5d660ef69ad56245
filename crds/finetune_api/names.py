"""Every wire name, written once: what it is called, and what it means.

Other modules import from here and never spell a label, a variable or a reason themselves.
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
"""Version of the contract between operator and pod; it rises when the shape of run.json changes."""


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
    """Labels on the objects the operator creates."""

    MANAGED_BY = "app.kubernetes.io/managed-by"
    """Always `finetune-operator`; the watches select by it."""
    NAME = f"{GROUP}/name"
    """Name of the FineTuneJob a child belongs to."""
    UID = f"{GROUP}/uid"
    """Uid of that FineTuneJob; a namesake created later has another."""
    ATTEMPT = f"{GROUP}/attempt"
    """Number of the attempt, counted from 1."""
    QUEUE = "kueue.x-k8s.io/queue-name"
    """Kueue's queue label, set from `placement.queueName`."""


class Annotation(StrEnum):
    """Annotations on the objects the operator creates."""

    RUN_CONFIG = f"{GROUP}/run.json"
    """The whole run configuration; mounted into the pod as a file by the downward API."""
    RUN_CONFIG_SHA256 = f"{GROUP}/spec-sha256"
    """sha256 of the attempt's run configuration (run.json); the key's name is older than this meaning and is kept."""
    RERUN_OF = f"{GROUP}/rerun-of"
    """On a FineTuneJob made by `finetune rerun`: name and uid of the job it was made from."""
    FROM_STEP = f"{GROUP}/from-step"
    """On such a job: optimizer step of the old job's checkpoint it starts from."""
    OBSERVED_VERSION = f"{GROUP}/observed-version"
    """On an event: resourceVersion of the FineTuneJob that it was told from; from the same version it is the same event, not a repeat."""


class Env(StrEnum):
    """Environment variables of the trainer container."""

    RUN_SHA256 = "FINETUNE_RUN_SHA256"
    """sha256 (hex) of the run configuration's bytes; a mismatch ends the pod with 70."""
    NODE_RANK = "FINETUNE_NODE_RANK"
    """Rank of this pod among the job's pods: the completion index of the Indexed Job."""
    POD_NAME = "FINETUNE_POD_NAME"
    """Name of this pod."""
    POD_UID = "FINETUNE_POD_UID"
    """Uid of this pod; rank 0's first eight hex digits are part of the incarnation's name in storage."""
    NODE_NAME = "FINETUNE_NODE_NAME"
    """Name of the node, for failure reports."""
    DISK_LIMIT = "FINETUNE_DISK_LIMIT_BYTES"
    """How much the pod may have on its disk, in bytes (its limit of ephemeral storage); absent in local runs."""
    RUN_FILE = "FINETUNE_RUN_FILE"
    """Path of the run configuration; default `/etc/finetune/run.json`."""
    WORK_DIR = "FINETUNE_WORK_DIR"
    """Writable scratch folder: downloads, staged checkpoints, logs; default `/work`."""
    TERMINATION_LOG = "FINETUNE_TERMINATION_LOG"
    """Where the last words go; default `/dev/termination-log`."""
    PORT = "FINETUNE_PORT"
    """Port of the progress server; default 8080. 0 takes a free one (local runs)."""
    INCARNATION = "FINETUNE_INCARNATION"
    """Set by the supervisor for its ranks: the folder name in storage, `a<attempt>-<8 hex>`."""
    FINAL_UPLOAD_TIMEOUT = "FINETUNE_FINAL_UPLOAD_TIMEOUT_SECONDS"
    """How long a store that is down is asked to take the final model, in seconds; default 1800."""
    UNSAVED_TIMEOUT = "FINETUNE_UNSAVED_TIMEOUT_SECONDS"
    """How long training may go on without a committed checkpoint while storage takes none, in seconds; default 21600."""
    HF_TOKEN = "HF_TOKEN"
    """Token for a model hub, from `model.tokenSecretRef`."""
    STORAGE_ACCESS_KEY = "AWS_ACCESS_KEY_ID"
    """From `storage.credentialsSecretRef`; the same variables under MODEL_ and DATASET_ prefixes carry the other two connections."""
    STORAGE_SECRET_KEY = "AWS_SECRET_ACCESS_KEY"
    """See STORAGE_ACCESS_KEY."""
    STORAGE_SESSION_TOKEN = "AWS_SESSION_TOKEN"
    """See STORAGE_ACCESS_KEY; optional in the Secret."""
    STORAGE_CUSTOMER_KEY = "AWS_SSE_CUSTOMER_KEY"
    """From `storage.encryption.customerKeySecretRef`, 32 bytes in base64; under the same prefixes for the other two connections."""


MODEL_CREDENTIALS_PREFIX = "MODEL_"
"""Prefix of the three AWS_ variables that carry `model.storage.credentialsSecretRef`."""
DATASET_CREDENTIALS_PREFIX = "DATASET_"
"""Prefix of the three AWS_ variables that carry `dataset.storage.credentialsSecretRef`."""

WANDB_KEY = "WANDB_API_KEY"
"""Variable that carries `tracking.wandb.apiKeySecretRef`; a variable of this name in `placement.env` wins."""
MONGODB_URI = "MONGODB_URI"
"""Variable that carries `tracking.mongodb.uriSecretRef`; a variable of this name in `placement.env` wins."""
HUB_TOKEN = "FINETUNE_HUB_TOKEN"
"""Variable that carries `output.hub.tokenSecretRef`: it may write, the one of `model.tokenSecretRef` need only read."""

RUN_MOUNT = "/etc/finetune"
RUN_FILE_NAME = "run.json"
RUN_FILE = f"{RUN_MOUNT}/{RUN_FILE_NAME}"
MAX_RUN_BYTES = 64 * 1024
"""Largest run configuration in bytes: it travels inside an annotation."""
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
"""Name of the one container of a trainer pod."""
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
    """How a pod ended. The operator's retry policy and `failure.class` follow from these."""

    OK = 0
    """The final artefact is committed."""
    CONFIG = 64
    """Bad configuration: only another spec can mend it."""
    DATA = 65
    """Bad data."""
    NOT_FOUND = 66
    """Model or data set missing or gated."""
    STORAGE_SETUP = 67
    """Storage wrongly set up: bucket, region, addressing, TLS. Not retried."""
    STORAGE = 69
    """Storage unreachable after retries."""
    INTERNAL = 70
    """Unclassified."""
    OUT_OF_MEMORY = 71
    """GPU out of memory."""
    DIVERGED = 72
    """Non-finite loss after rollbacks."""
    NO_CHECKPOINT = 73
    """Progress existed and no checkpoint can be loaded."""
    PEER = 74
    """A peer or a collective failed, or the run hung."""
    PREEMPTED_SAVED = 75
    """Stopped on request, state saved."""
    PREEMPTED_UNSAVED = 76
    """Stopped on request, state not saved."""
    CREDENTIALS = 77
    """Credentials or permission."""
    INSTALLATION_BROKEN = 78
    """The image or the node lacks a compiler, library or driver that the run needs."""
    TOO_OLD = 79
    """The trainer image is older than a field that the user set: the job waits for a newer image."""
    GATE_FAILED = 80
    """The trained model missed a gate in `evaluation.gates`; the model is kept."""
    KILLED = 137
    """SIGKILL; with reason OOMKilled: host memory."""
    TERMINATED = 143
    """SIGTERM that nobody handled."""


class FailureClass(StrEnum):
    """Whose fault a failure is; the first word a user reads."""

    USER = "User"
    """The spec cannot work; only another spec helps."""
    DATA = "Data"
    """The data cannot be trained on."""
    MODEL = "Model"
    """The model is missing, gated or unusable."""
    STORAGE = "Storage"
    """Object storage refused or could not be reached."""
    OUT_OF_MEMORY = "OutOfMemory"
    """GPU or host memory was exhausted."""
    DIVERGED = "Diverged"
    """Loss or gradients were not finite."""
    PREEMPTED = "Preempted"
    """The cluster took the pods."""
    INFRASTRUCTURE = "Infrastructure"
    """A node, a peer, the network or the installation failed."""
    INTERNAL = "Internal"
    """Unclassified, possibly a bug."""


class Phase(StrEnum):
    """One word for people. Derived from facts, never read back; programs read conditions."""

    PENDING = "Pending"
    """Not started: the job waits for something in the cluster."""
    VALIDATING = "Validating"
    """The spec, the model and the data are being checked."""
    QUEUED = "Queued"
    """Waiting for quota in a queue."""
    STARTING = "Starting"
    """Pods are being created, or they load the model."""
    RUNNING = "Running"
    """Training."""
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
    """Ended by spec.cancel. Final."""
    SUCCEEDED = "Succeeded"
    """The final artefact is committed. Final."""
    FAILED = "Failed"
    """Ended without the final artefact. Final."""


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
    """No pods exist because the user asked for it."""
    CHECKPOINTS_HEALTHY = "CheckpointsHealthy"
    """Checkpoints are being committed and verified."""
    SUCCEEDED = "Succeeded"
    """The final artefact is committed."""
    FINISHED = "Finished"
    """No further attempt will be made."""
    RECONCILING = "Reconciling"
    """kstatus: present and True while there is work going on."""
    STALLED = "Stalled"
    """kstatus: present and True after a terminal failure, or when a human is needed."""


class Reason(StrEnum):
    """Reasons in conditions, attempts and events: one word a program can match on."""

    # Acceptance
    ACCEPTED = "Accepted"
    """The spec passed every check that needs neither model nor data."""
    REJECTED = "Rejected"
    """A check refused the spec; the message names the field."""
    NOT_SUPPORTED_YET = "NotSupportedYet"
    """A field of the API whose behaviour this version does not have."""
    UNKNOWN_NODE_POOL = "UnknownNodePool"
    """`resources.nodePool` names no pool of the operator's configuration."""
    POOL_TOO_SMALL = "PoolTooSmall"
    """More GPUs a node, or more nodes, were asked for than the pool has."""
    POOL_LACKS_RESOURCE = "PoolLacksResource"
    """`resources.gpuResource` is not what the nodes of the pool have."""
    OPERATOR_TOO_OLD = "OperatorTooOld"
    """The spec has a field or a value that this version of the operator does not know; the job waits for a newer operator."""
    SPEC_CHANGED = "SpecChanged"
    """The spec is not the one that the first attempt started from, usually because an older CRD removed a field; the job waits."""
    STORAGE_NOT_CONFIGURED = "StorageNotConfigured"
    """Neither the spec nor the operator's configuration names a storage uri."""
    # Waiting
    QUEUED = "Queued"
    """Waiting for quota in a queue."""
    CHILDREN_CONFLICT = "ChildrenConflict"
    """A child's name is taken by an object that is not ours."""
    QUOTA_EXCEEDED = "QuotaExceeded"
    """A resource quota refused the pods."""
    FORBIDDEN_BY_POLICY = "ForbiddenByPolicy"
    """An admission policy (Pod Security, a webhook) refused the pods."""
    JOB_REJECTED = "JobRejected"
    """The API server rejected the Job of an attempt, and the user's spec is not the cause: the operator's configuration must change."""
    UNSCHEDULABLE = "Unschedulable"
    """The scheduler finds no node; its words are in the message."""
    IMAGE_PULL_FAILED = "ImagePullFailed"
    """The image cannot be pulled."""
    CONFIG_MISSING = "ConfigMissing"
    """A Secret, ConfigMap or volume that the pod needs does not exist."""
    START_TIMEOUT = "StartTimeout"
    """`policy.startTimeoutSeconds` passed without all pods running."""
    # Life
    PROGRESSING = "Progressing"
    """Work is going on."""
    ATTEMPT_STARTED = "AttemptStarted"
    """A Job was created for an attempt."""
    TRAINING_STARTED = "TrainingStarted"
    """The first optimizer step was seen."""
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
    """A committed checkpoint did not verify; an older one was used."""
    STAGING_DISK_FULL = "StagingDiskFull"
    """A checkpoint was skipped for lack of local disk."""
    CHECKPOINT_NOT_STORED = "CheckpointNotStored"
    """A checkpoint could not be staged or uploaded; training goes on, and the one committed before it counts."""
    STATUS_REJECTED = "StatusRejected"
    """The API server rejected the status; it is written without what the pods reported, so that the job can still be controlled."""
    # Ends of attempts and jobs
    PREEMPTED = "Preempted"
    """The cluster took the pods; the attempt is free of charge."""
    GANG_INCOMPLETE = "GangIncomplete"
    """Some pods of the attempt had nodes and others had none until the start timeout; they were deleted to free the nodes for another job."""
    NODE_LOST = "NodeLost"
    """A node went away under its pod."""
    OUT_OF_MEMORY = "OutOfMemory"
    """GPU or host memory was exhausted."""
    DIVERGED = "Diverged"
    """Loss or gradient norm was not finite."""
    STALLED = "Stalled"
    """No step for longer than the stall timeout."""
    PEER_FAILED = "PeerFailed"
    """A peer or a collective failed."""
    RETRIES_EXHAUSTED = "RetriesExhausted"
    """As many attempts without progress as `policy.retries` allows."""
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    """`policy.activeDeadlineSeconds` passed."""
    USER_ERROR = "UserError"
    """The configuration cannot work."""
    DATA_ERROR = "DataError"
    """The data cannot be trained on."""
    MODEL_ERROR = "ModelError"
    """The model is missing, gated or unusable."""
    STORAGE_ERROR = "StorageError"
    """Object storage refused or could not be reached."""
    INTERNAL_ERROR = "InternalError"
    """Unclassified."""
    INSTALLATION_BROKEN = "InstallationBroken"
    """The image or the node lacks a compiler, library or driver that the run needs."""
    TRAINER_TOO_OLD = "TrainerTooOld"
    """The trainer image does not know a field that the user set; the job waits for a newer image."""
    GATE_FAILED = "GateFailed"
    """The trained model missed a gate; the model is kept."""
    SUSPENDED = "Suspended"
    """`spec.suspend` is true and no pod is left."""
    SUSPENDING = "Suspending"
    """`spec.suspend` is true; the pods are saving."""
    RESUMED = "Resumed"
    """`spec.suspend` went back to false."""
    CANCELLING = "Cancelling"
    """`spec.cancel` is true; the pods are saving."""
    CANCELLED = "Cancelled"
    """`spec.cancel` is true and no pod is left."""
    SUCCEEDED = "Succeeded"
    """The final artefact is committed."""
    FAILED = "Failed"
    """The job ended without its artefact."""


class Storage(StrEnum):
    """Names of folders and objects below `<storage.uri>/<namespace>/<name>/<uid>/`."""

    CHECKPOINTS = "checkpoints"
    MODEL = "model"
    METRICS = "metrics"
    EVALUATION = "evaluation"
    REPORT = "report"
    RUN = "run"
    MANIFEST = "manifest.json"
    """Inside an incarnation's folder: every file with size and sha256, and what the state means."""
    COMMITTED = "_COMMITTED"
    """Beside the incarnation folders, written last: JSON {attempt, path, manifestSha256}."""
    HEALTHY = "_HEALTHY"
    """Written when the window after the checkpoint was finite too."""


def checkpoint_folder(step: int) -> str:
    """Folder of the checkpoint of `step` (optimizer steps), eight digits so that names sort as numbers do."""
    return f"step-{step:08d}"


def incarnation(attempt: int, pod_uid: str) -> str:
    """Name of what one life of an attempt writes: `a<attempt>-<8 hex of rank 0's pod uid>`. A zombie has another."""
    digits = "".join(c for c in pod_uid.lower() if c in "0123456789abcdef")[:8]
    return f"a{attempt}-{digits:0<8}"


def attempt_of_uri(uri: str) -> int | None:
    """Attempt that wrote the checkpoint of this uri, from its incarnation's folder; None if the uri does not end in one."""
    word, _, digits = uri.rstrip("/").rpartition("/")[2].partition("-")
    number = word[1:]
    return int(number) if word[:1] == "a" and number.isdecimal() and len(digits) == 8 else None


def attempt_folder(attempt: int) -> str:
    """Folder below `run/` in which an attempt tells that it has begun."""
    return f"{_ATTEMPT_FOLDER}{attempt}"


def attempt_of_folder(name: str) -> int | None:
    """Attempt that a folder below `run/` belongs to; None if it is none of an attempt's."""
    number = name.removeprefix(_ATTEMPT_FOLDER)
    return int(number) if number != name and number.isdecimal() else None


_ATTEMPT_FOLDER = "attempt-"


def attempt_job_name(name: str, attempt: int) -> str:
    """Name of the Job (and of its Service) of one attempt."""
    return f"{name}-{attempt}"
