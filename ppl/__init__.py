"""Programs in, posteriors out."""

from ppl.program import Program
