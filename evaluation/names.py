"""Names that people choose ways of evaluating by, on command lines and in functions; imports nothing."""

GENERATED, FORCED, TWO_PASS = "generate", "teacher_forced", "two_pass"
PROTOCOL_NAMES = (GENERATED, FORCED, TWO_PASS)  # how answers come about; `evaluation.protocols` has the functions
ON_MISSING = ("empty", "error")  # what the judge does with a query that has no entry
COCO, SEMANTIC, PANOPTIC = "coco", "semantic", "panoptic"
FORMS = (COCO, SEMANTIC, PANOPTIC)  # of exports
