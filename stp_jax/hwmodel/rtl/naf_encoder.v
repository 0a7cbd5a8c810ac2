// Binary to minimal signed digit (non-adjacent form), combinational.
//
// The digits are the bitwise difference of 3x/2 and x/2 (Prodinger, Integers 0, 2000, A8): +1 where
// only 3x/2 has the bit, -1 where only x/2 has it. Both are rounded down: the half bit is the same
// in both. Two's complement needs no special case: x and 3x have the same sign, so their sign
// extensions cancel and the digits end at bit WIDTH-1.
module naf_encoder #(
    parameter WIDTH = 8
) (
    input  signed [WIDTH-1:0] value,
    output        [WIDTH-1:0] plus,   // bit e: the digit of 2^e is +1
    output        [WIDTH-1:0] minus   // bit e: the digit of 2^e is -1
);
    wire signed [WIDTH:0] half = value >>> 1;
    wire signed [WIDTH:0] three_halves = value + half;
    wire        [WIDTH:0] changed = half ^ three_halves;

    assign plus  = three_halves[WIDTH-1:0] & changed[WIDTH-1:0];
    assign minus = half[WIDTH-1:0] & changed[WIDTH-1:0];
endmodule
