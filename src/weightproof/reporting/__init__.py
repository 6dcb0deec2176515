"""The parts of the HTML report and the pictures."""
