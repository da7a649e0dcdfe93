"""Groups of ranks: who belongs to one, how processes meet and share memory, how many SMs ops take."""
