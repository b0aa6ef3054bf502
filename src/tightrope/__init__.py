"""tightrope: train neural networks that are provably robust, and prove it, input by input."""
