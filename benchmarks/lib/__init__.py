"""Parts of the load benchmark: a control plane with raised limits, simulated nodes, clients, and measurements."""
