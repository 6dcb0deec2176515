"""How the processes of one run meet, agree and hold parts of a tensor."""
