"""Random calls of every public function: backends against the reference, good arguments and bad ones (make fuzz)."""
