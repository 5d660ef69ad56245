-- Health of a FineTuneJob for Argo CD. It agrees with kstatus, the library of Flux and Helm: Reconciling is Progressing, Stalled is Degraded.
-- A suspended job is Suspended. A cancelled job is Healthy, because it does what its spec says.
local status = obj.status
if status == nil or status.observedGeneration == nil or status.observedGeneration ~= obj.metadata.generation then
  return {status = "Progressing", message = "The operator has not seen this version of the job."}
end
local health = {status = "Healthy", message = status.phase or ""}
for _, condition in ipairs(status.conditions or {}) do
  local is_true = condition.status == "True"
  local message = (status.phase or "") .. ": " .. (condition.message or condition.reason or "")
  if is_true and condition.type == "Reconciling" then
    return {status = "Progressing", message = message}
  elseif is_true and condition.type == "Stalled" then
    return {status = "Degraded", message = message}
  elseif is_true and condition.type == "Suspended" then
    health = {status = "Suspended", message = "Suspended: set spec.suspend to false to continue."}
  end
end
return health
