"""The workshop that makes the shipped small teachers and their judges."""
