"""The files of results that a run writes beside its final model: metrics, the test rows and the comparison of answers.

The functions of this package are pure: they get values and return the contents of files. They start no process, use no storage and
import no torch, so ranks and the supervisor can both call them.
"""
