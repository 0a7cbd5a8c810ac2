"""Processing elements in Verilog, studied for energy and area, and the bench that plays them."""
