"""A whole MoE layer on the ops: its parameters, its checks, its arrays on the mesh."""
