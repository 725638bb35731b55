"""How results are compared: groups of seeds, intervals, the rule of the verdict. No drawing, no HTML."""
