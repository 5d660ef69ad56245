"""PID 1 of a trainer pod. It imports no torch: it answers HTTP within a second and costs little memory.

`supervise` tells the story; `prepare` fetches and checks, `children` starts, reaps and kills processes, `line` hears the
ranks, `board` knows what they said, `server` answers HTTP, `settings` are the environment.
"""
