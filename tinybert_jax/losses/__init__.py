"""Training losses: pure functions of arrays that apply the mask and divide by the count."""
