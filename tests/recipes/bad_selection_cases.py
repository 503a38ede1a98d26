"""The corpus of bad inputs, continued: selections of synthetic images that cannot be made."""

from bad_input_cases import Case, field, given

CASES = [
    field("selection=5", "selection: got 5", "this is a section", "selection.confidence="),
    field("selection.confidance=[0,1]", "selection.confidance: unknown field", "did you mean confidence"),
    field("selection.confidence=0.5", "selection.confidence: got 0.5"),
    field("selection.confidence=[0.5]", "selection.confidence: got [0.5]", "as in [0.5, 1.0]"),
    field("selection.confidence=[0.9,0.6]", "selection.confidence: got [0.9, 0.6]", "below the highest"),
    field("selection.confidence=[0.5,1.5]", "selection.confidence.1: got 1.5", "less than or equal to 1"),
    field("selection.confidence=[0.1,0.2]", "selection.confidence: got [0.1, 0.2]", "of 4 classes", "0.25 or more"),
    field("selection.balance=2", "selection.balance: got 2", "less than or equal to 1"),
    field("selection.balance=true", "selection.balance: got true", "not a switch"),
    field("selection.duplicates=1.5", "selection.duplicates: got 1.5", "less than or equal to 1"),
    field("selection.duplicates=0.001", "selection.duplicates: got 0.001", "0.01 or more"),
    field("selection.disagreement=-1", "selection.disagreement: got -1", "greater than or equal to 0"),
    field("selection.disagreement=.inf", "selection.disagreement: got"),
    field("selection.disagreement=1", "selection.disagreement: got 1", "with rounds=1", "set rounds to 2"),
    Case(
        "disagreement of a student alone",
        given("selection.disagreement=1", "rounds=2", name="distill"),
        "selection.disagreement: got 1",
        ("trains in one go", "diffdfkd run"),
    ),
]
