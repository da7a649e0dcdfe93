"""A trainer for decoders like DeepSeek-V3 on meshes of any size; README.md says how to start."""
