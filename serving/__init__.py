"""The engines behind one HTTP contract, and how they are launched and staged."""
