"""Low-rank auto-encoder layers (CoLA, CoLA-M): modules, ranks, accounting, analysis."""
