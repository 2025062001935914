"""One stage trained several ways on the same rows: what each method costs, what it gives, what it makes forget."""
