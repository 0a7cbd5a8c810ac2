// The hard blocks of VTR's architecture that designs are mapped to, and how Yosys' cells become them.
(* blackbox *)
module adder (input a, b, cin, output cout, sumout);
endmodule

(* blackbox *)
module multiply (input [8:0] a, b, output [17:0] out);
endmodule
