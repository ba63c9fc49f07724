"""How the small pretrained base of the toy world is made: sizes, vocabulary, targets, dialogues, training stages."""
