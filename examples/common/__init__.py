"""The parts of a run that both training examples share; they know no model."""
