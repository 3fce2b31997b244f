"""The paper's comparison at laptop size: a row for each system, several seeds, and what they say of its claims."""
