"""A real Kubernetes on one machine, for the demo, the tests, and whoever has no cluster at hand."""
