"""Pictures that nodes draw: cards with charts, labelled sheets."""
