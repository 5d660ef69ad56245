"""The supervisor: PID 1 of a trainer pod. The supervisor does not import torch, so it answers HTTP requests within a second and needs little memory.

`supervise` runs the steps from pod start to exit code. `prepare` and `fetch` download and check the inputs. `agent_process`
starts the ranks, `rank_channel` receives the ranks' messages and `rank_messages` handles them. `staging` hands checkpoints to
the uploader. `run_state` holds the state of the run, and `server` serves the state over HTTP. `stall` detects a run without progress.
`exit_decision` chooses the exit code.
"""
