// int8 dot-product PE, radix-4 Booth: LANES multiplications a cycle, for COLUMNS columns that share
// the weights' registers. Weights arrive recoded, four digits of {negative, two, one} each, as they
// leave an encoder at the row's edge; activations are unsigned (signed ones plus 2^7).
//
// A digit adds 0, x, 2x or the complement of one of them in nine bits, (511 - d) - 511, with no sign
// to extend: what is thereby added too much depends on the weights alone and is taken off with the
// filter's bias.
module mac_booth_dot #(
    parameter LANES = 8,
    parameter COLUMNS = 1,
    parameter WIDTH = 8,
    parameter PSUM = 28,
    parameter RIPPLE = 1,
    parameter DIGITS = WIDTH / 2
) (
    input                                 clock,
    input                                 load,
    input      [COLUMNS*LANES*WIDTH-1:0]  activations_in,
    input      [LANES*DIGITS*3-1:0]       weights_in,
    output reg [LANES*DIGITS*3-1:0]       weights,
    input      [COLUMNS*PSUM-1:0]         psum_in,
    output reg [COLUMNS*PSUM-1:0]         psum
);
    localparam WORDS = LANES * DIGITS + 1;

    reg [COLUMNS*LANES*WIDTH-1:0] activations;  // taken from the column's bus with `load`
    genvar c, l, i;
    generate
        for (c = 0; c < COLUMNS; c = c + 1) begin : column
            wire [WORDS*PSUM-1:0] words;
            wire [PSUM-1:0] sum, carry, total;
            for (l = 0; l < LANES; l = l + 1) begin : lane
                wire [WIDTH-1:0] x = activations[(c*LANES + l)*WIDTH +: WIDTH];
                for (i = 0; i < DIGITS; i = i + 1) begin : digit
                    wire negative, two, one;
                    assign {negative, two, one} = weights_in[(l*DIGITS + i)*3 +: 3];
                    wire [WIDTH:0] multiple = (x & {WIDTH{one}}) | ({x, 1'b0} & {(WIDTH+1){two}});
                    wire [WIDTH:0] row = multiple ^ {(WIDTH+1){negative}};
                    assign words[(i*LANES + l)*PSUM +: PSUM] =
                        {{(PSUM-WIDTH-1){1'b0}}, row} << (2*i);
                end
            end
            assign words[(WORDS-1)*PSUM +: PSUM] = psum_in[c*PSUM +: PSUM];
            carry_save_tree #(.WORDS(WORDS), .WIDTH(PSUM)) tree (
                .words(words), .low({(WORDS-2){1'b0}}), .sum(sum), .carry(carry)
            );
            if (RIPPLE) begin : chain
                ripple_adder #(.WIDTH(PSUM)) adder (.a(sum), .b(carry), .sum(total));
            end else begin : prefix
                assign total = sum + carry;
            end
            always @(posedge clock) psum[c*PSUM +: PSUM] <= total;
        end
    endgenerate

    always @(posedge clock) begin
        if (load) activations <= activations_in;
        weights <= weights_in;
    end
endmodule
