"""Cases from generators that others wrote: NNSmith's random models, and random settings of Inductor. ``make sweep`` runs them."""
