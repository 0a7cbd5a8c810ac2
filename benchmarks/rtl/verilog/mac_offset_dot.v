// int8 dot-product PE in offset form: LANES multiplications a cycle, for COLUMNS columns that share
// the weights' registers.
//
// Weights are sign and magnitude, activations unsigned (signed ones plus 2^7). A negative weight
// multiplies the complement, -x = (255 - x) - 255, so each product is seven rows of AND gates with
// no sign to extend, and small weights leave the upper rows still. What is thereby added too much
// depends on the weights alone and is taken off with the filter's bias.
module mac_offset_dot #(
    parameter LANES = 8,
    parameter COLUMNS = 1,
    parameter WIDTH = 8,
    parameter PSUM = 28,
    parameter RIPPLE = 1
) (
    input                                 clock,
    input                                 load,
    input      [COLUMNS*LANES*WIDTH-1:0]  activations_in,
    input      [LANES*WIDTH-1:0]          weights_in,   // {sign, magnitude}
    output reg [LANES*WIDTH-1:0]          weights,
    input      [COLUMNS*PSUM-1:0]         psum_in,
    output reg [COLUMNS*PSUM-1:0]         psum
);
    localparam ROWS = WIDTH - 1;  // of AND gates
    localparam WORDS = LANES * ROWS + 1;

    reg [COLUMNS*LANES*WIDTH-1:0] activations;  // taken from the column's bus with `load`
    genvar c, l, i;
    generate
        for (c = 0; c < COLUMNS; c = c + 1) begin : column
            wire [WORDS*PSUM-1:0] words;
            wire [PSUM-1:0] sum, carry, total;
            for (l = 0; l < LANES; l = l + 1) begin : lane
                wire [WIDTH-1:0] x = activations[(c*LANES + l)*WIDTH +: WIDTH]
                                     ^ {WIDTH{weights_in[l*WIDTH + WIDTH-1]}};
                for (i = 0; i < ROWS; i = i + 1) begin : digit
                    wire [WIDTH-1:0] row = x & {WIDTH{weights_in[l*WIDTH + i]}};
                    assign words[(i*LANES + l)*PSUM +: PSUM] = {{(PSUM-WIDTH){1'b0}}, row} << i;
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
