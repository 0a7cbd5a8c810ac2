// int8 dot-product PE, radix-4 Booth, that zero activations keep still: as mac_booth_dot, but exact.
//
// A digit adds 0, x, 2x or the complement of one of them and one; a zero activation is never
// complemented. So zeros, of which a ReLU leaves many, move nothing, and nothing is left to take off.
module mac_quiet_booth_dot #(
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
    localparam WORDS = LANES * (DIGITS + 1) + 2;
    // Each row's sign bit is inverted, which adds 2^WIDTH * 4^i for row i.
    localparam [PSUM-1:0] OFFSET = -(LANES * (((1 << (2*DIGITS)) - 1) / 3) << WIDTH);

    reg [COLUMNS*LANES*WIDTH-1:0] activations;  // taken from the column's bus with `load`
    genvar c, l, i;
    generate
        for (c = 0; c < COLUMNS; c = c + 1) begin : column
            wire [WORDS*PSUM-1:0] words;
            wire [PSUM-1:0] sum, carry, total;
            for (l = 0; l < LANES; l = l + 1) begin : lane
                wire [WIDTH-1:0] x = activations[(c*LANES + l)*WIDTH +: WIDTH];
                wire live = |x;
                wire [2*DIGITS-1:0] ones;  // what completes the complements
                for (i = 0; i < DIGITS; i = i + 1) begin : digit
                    wire negative, two, one;
                    assign {negative, two, one} = weights_in[(l*DIGITS + i)*3 +: 3];
                    wire complement = negative & live;
                    wire [WIDTH:0] multiple =
                        ({x[WIDTH-1], x} & {(WIDTH+1){one}}) | ({x, 1'b0} & {(WIDTH+1){two}});
                    wire [WIDTH:0] row = multiple ^ {(WIDTH+1){complement}};
                    assign words[(i*LANES + l)*PSUM +: PSUM] =
                        {{(PSUM-WIDTH-1){1'b0}}, ~row[WIDTH], row[WIDTH-1:0]} << (2*i);
                    assign ones[2*i +: 2] = {1'b0, complement};
                end
                assign words[(DIGITS*LANES + l)*PSUM +: PSUM] = {{(PSUM-2*DIGITS){1'b0}}, ones};
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
