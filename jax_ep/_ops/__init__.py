"""The public ops, dispatch and combine, whole and in halves; their checks and their gradients."""
