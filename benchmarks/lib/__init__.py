"""Modules that several benchmarks share: pods as local processes, a control plane with simulated nodes and clients, and measurements."""
