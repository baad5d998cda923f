"""How a push travels through the model: patching, attribution, freezing, value vectors."""
