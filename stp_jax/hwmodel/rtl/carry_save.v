// Carry-save arithmetic.
//
// A full adder is a module of its own so that synthesis can map it to the library's full-adder
// cell, which takes less than half the energy of the same function out of XOR and AND-OR gates.
module full_adder (
    input  a,
    input  b,
    input  c,
    output s,
    output co
);
    assign s  = a ^ b ^ c;
    assign co = (a & b) | (c & (a | b));
endmodule

// Three words to two: sum and carry, the carry already moved up a bit with `low` in its lowest.
module carry_save #(
    parameter WIDTH = 16
) (
    input  [WIDTH-1:0] a,
    input  [WIDTH-1:0] b,
    input  [WIDTH-1:0] c,
    input              low,
    output [WIDTH-1:0] sum,
    output [WIDTH-1:0] carry
);
    wire [WIDTH:0] carries;
    assign carries[0] = low;
    assign carry = carries[WIDTH-1:0];

    genvar i;
    generate
        for (i = 0; i < WIDTH; i = i + 1) begin : bit_position
            full_adder adder (.a(a[i]), .b(b[i]), .c(c[i]), .s(sum[i]), .co(carries[i+1]));
        end
    endgenerate
endmodule

// WORDS words to two, oldest first, so that all come through about as many adders. `low` has a bit
// of weight one for each adder: the +1 of negated words costs nothing.
module carry_save_tree #(
    parameter WORDS = 5,
    parameter WIDTH = 16
) (
    input  [WORDS*WIDTH-1:0] words,
    input  [WORDS-3:0]       low,
    output [WIDTH-1:0]       sum,
    output [WIDTH-1:0]       carry
);
    localparam ADDERS = WORDS - 2;
    wire [WIDTH-1:0] queue [0:WORDS+2*ADDERS-1];

    genvar i;
    generate
        for (i = 0; i < WORDS; i = i + 1) begin : word
            assign queue[i] = words[i*WIDTH +: WIDTH];
        end
        for (i = 0; i < ADDERS; i = i + 1) begin : reduce
            carry_save #(.WIDTH(WIDTH)) adder (
                .a(queue[3*i]), .b(queue[3*i+1]), .c(queue[3*i+2]), .low(low[i]),
                .sum(queue[WORDS+2*i]), .carry(queue[WORDS+2*i+1])
            );
        end
    endgenerate
    assign sum = queue[WORDS+2*ADDERS-2];
    assign carry = queue[WORDS+2*ADDERS-1];
endmodule

// Carry-propagating addition by a chain of full adders: the least energy, if there is time.
module ripple_adder #(
    parameter WIDTH = 16
) (
    input  [WIDTH-1:0] a,
    input  [WIDTH-1:0] b,
    output [WIDTH-1:0] sum
);
    wire [WIDTH:0] carries;
    assign carries[0] = 1'b0;

    genvar i;
    generate
        for (i = 0; i < WIDTH; i = i + 1) begin : bit_position
            full_adder adder (.a(a[i]), .b(b[i]), .c(carries[i]), .s(sum[i]), .co(carries[i+1]));
        end
    endgenerate
endmodule
