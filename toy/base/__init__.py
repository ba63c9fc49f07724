"""Trains the small LLaVA and SAM that the toy recipes start from: sizes, vocabulary, targets, dialogues, stages."""
