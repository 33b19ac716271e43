"""What choosing layers for each query has to beat: fixed sets, simple choices by the query's embedding, and the oracle."""
