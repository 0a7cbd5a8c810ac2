// Dot-product PE: LANES multiplications a cycle, of activations by weights of their own width, for
// COLUMNS columns that share the weights' registers. Each product is an array of AND gates (Baugh
// and Wooley's form of the signed one), and one carry-save tree adds all partial products and the
// partial sum from above.
module mac_dot #(
    parameter LANES = 8,
    parameter COLUMNS = 1,
    parameter WIDTH = 8,        // bits of an activation
    parameter WEIGHT_WIDTH = 8,
    parameter PSUM = 28,
    parameter RIPPLE = 1        // the carry-propagating adder is a chain of full adders
) (
    input                                   clock,
    input                                   load,
    input      [COLUMNS*LANES*WIDTH-1:0]    activations_in,
    input      [LANES*WEIGHT_WIDTH-1:0]     weights_in,
    output reg [LANES*WEIGHT_WIDTH-1:0]     weights,
    input      [COLUMNS*PSUM-1:0]           psum_in,
    output reg [COLUMNS*PSUM-1:0]           psum
);
    // Baugh and Wooley: complement the products with one sign bit, and add the powers of two that
    // this leaves over.
    localparam [PSUM-1:0] OFFSET = LANES
        * ((1 << (WIDTH-1)) + (1 << (WEIGHT_WIDTH-1)) - (1 << (WIDTH+WEIGHT_WIDTH-1)));
    localparam WORDS = LANES * WEIGHT_WIDTH + 2;

    reg [COLUMNS*LANES*WIDTH-1:0] activations;  // taken from the column's bus with `load`
    genvar c, l, i;
    generate
        for (c = 0; c < COLUMNS; c = c + 1) begin : column
            wire [WORDS*PSUM-1:0] words;
            wire [PSUM-1:0] sum, carry, total;
            for (l = 0; l < LANES; l = l + 1) begin : lane
                wire [WIDTH-1:0] x = activations[(c*LANES + l)*WIDTH +: WIDTH];
                for (i = 0; i < WEIGHT_WIDTH; i = i + 1) begin : digit
                    wire [WIDTH-1:0] row = x & {WIDTH{weights_in[l*WEIGHT_WIDTH + i]}};
                    wire [WIDTH-1:0] flipped =
                        row ^ (i == WEIGHT_WIDTH-1 ? (1 << (WIDTH-1)) - 1 : 1 << (WIDTH-1));
                    assign words[(i*LANES + l)*PSUM +: PSUM] = {{(PSUM-WIDTH){1'b0}}, flipped} << i;
                end
            end
            assign words[(WORDS-2)*PSUM +: PSUM] = OFFSET;
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
