"""The objective that is minimised: one module a trainer type. Each imports TRL, so they are loaded by name, one per job."""
