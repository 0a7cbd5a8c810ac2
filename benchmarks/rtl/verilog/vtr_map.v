// Additions as VTR's carry chains, whose first cell makes the carry in, and products of up to 9 bits
// as its hard multipliers. Carries out are not used.
(* techmap_celltype = "$alu" *)
module chain_of_adders (A, B, CI, BI, X, Y, CO);
    parameter A_SIGNED = 0;
    parameter B_SIGNED = 0;
    parameter A_WIDTH = 1;
    parameter B_WIDTH = 1;
    parameter Y_WIDTH = 1;
    input [A_WIDTH-1:0] A;
    input [B_WIDTH-1:0] B;
    input CI, BI;
    output [Y_WIDTH-1:0] X, Y, CO;
    wire [Y_WIDTH-1:0] a, b, flipped;
    wire [Y_WIDTH:0] carry;
    \$pos #(.A_SIGNED(A_SIGNED), .A_WIDTH(A_WIDTH), .Y_WIDTH(Y_WIDTH)) wide_a (.A(A), .Y(a));
    \$pos #(.A_SIGNED(B_SIGNED), .A_WIDTH(B_WIDTH), .Y_WIDTH(Y_WIDTH)) wide_b (.A(B), .Y(b));
    assign flipped = b ^ {Y_WIDTH{BI}};
    adder first (.a(CI), .b(CI), .cin(1'bx), .cout(carry[0]));
    genvar i;
    generate
        for (i = 0; i < Y_WIDTH; i = i + 1) begin : digit
            adder cell_i (
                .a(a[i]), .b(flipped[i]), .cin(carry[i]), .cout(carry[i+1]), .sumout(Y[i])
            );
        end
    endgenerate
    assign X = a ^ flipped;
    assign CO = {Y_WIDTH{1'bx}};
endmodule

(* techmap_celltype = "$mul" *)
module hard_multiplier (A, B, Y);
    parameter A_SIGNED = 0;
    parameter B_SIGNED = 0;
    parameter A_WIDTH = 1;
    parameter B_WIDTH = 1;
    parameter Y_WIDTH = 1;
    input [A_WIDTH-1:0] A;
    input [B_WIDTH-1:0] B;
    output [Y_WIDTH-1:0] Y;
    wire [8:0] a, b;
    wire [17:0] product;
    wire _TECHMAP_FAIL_ = A_WIDTH > 8 || B_WIDTH > 8;
    \$pos #(.A_SIGNED(A_SIGNED), .A_WIDTH(A_WIDTH), .Y_WIDTH(9)) wide_a (.A(A), .Y(a));
    \$pos #(.A_SIGNED(B_SIGNED), .A_WIDTH(B_WIDTH), .Y_WIDTH(9)) wide_b (.A(B), .Y(b));
    multiply block (.a(a), .b(b), .out(product));
    \$pos #(.A_SIGNED(1), .A_WIDTH(18), .Y_WIDTH(Y_WIDTH)) wide_y (.A(product), .Y(Y));
endmodule
