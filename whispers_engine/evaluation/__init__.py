"""How near a committee's answers are to what people answered: data, rows, figures, intervals, a report."""
