// The primitives of VPR's netlists, with the delays in ps that its SDF file gives them. Wires delay
// every change; what a look-up table's output would do for less than its delay does not happen.
`timescale 1ps/1ps
module fpga_interconnect #(parameter DELAY = 0) (input datain, output reg dataout);
    initial dataout = 0;
    always @(datain) dataout <= #DELAY datain;
endmodule

module LUT_K #(parameter K = 6, parameter [(1<<K)-1:0] LUT_MASK = 0, parameter DELAY = 0) (
    input [K-1:0] in, output out
);
    assign #DELAY out = LUT_MASK[in];
endmodule

module DFF #(parameter INITIAL_VALUE = 0, parameter DELAY = 0) (input clock, D, output reg Q);
    initial Q = INITIAL_VALUE;
    always @(posedge clock) Q <= #DELAY D;
endmodule

module adder #(parameter WIDTH = 1, parameter DELAY = 0, parameter CARRY_DELAY = 0) (
    input a, b, cin, output cout, sumout
);
    wire one, both;
    assign #DELAY one = a ^ b;
    assign #DELAY both = a & b;
    assign #CARRY_DELAY cout = one ? cin : both;
    assign #DELAY sumout = a ^ b ^ cin;
endmodule

module multiply #(parameter WIDTH = 9, parameter DELAY = 0) (
    input [WIDTH-1:0] a, b, output [2*WIDTH-1:0] out
);
    assign #DELAY out = $signed(a) * $signed(b);
endmodule
