"""What the load benchmark is made of: a control plane that is not the limit, played nodes, clients, and measurements."""
