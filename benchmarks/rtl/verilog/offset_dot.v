// Feed-forward group PE in offset form: as term_dot, but no operand has a sign.
//
// Activations are unsigned as they stand here: those of a ReLU as they are, signed ones plus 2^7
// (their top bit inverted on the way in). A subtracted term adds the complement instead:
// -x = (255 - x) - 255. So every operand is eight bits shifted up, zeros on either side: no sign to
// extend, no +1 to carry in, and a change of sign toggles eight bits instead of all of them. What
// is thereby added too much, 255 * 2^e for each subtracted term and 2^7 * w for each weight w of
// signed activations, depends on the weights alone and is taken off with the filter's bias before
// the sums enter the array.
module offset_lane #(
    parameter GROUP = 8,
    parameter WIDTH = 8,
    parameter EXPONENT = $clog2(WIDTH),
    parameter OUT = 2 * WIDTH - 1
) (
    input  [GROUP*WIDTH-1:0] activations,
    input  [GROUP-1:0]       select,    // one-hot; all zero: an empty slot
    input                    negative,  // zero in an empty slot
    input  [EXPONENT-1:0]    exponent,
    output [OUT-1:0]         value
);
    integer i;
    reg [WIDTH-1:0] selected;
    always @* begin
        selected = {WIDTH{1'b0}};
        for (i = 0; i < GROUP; i = i + 1)
            selected = selected | (activations[i*WIDTH +: WIDTH] & {WIDTH{select[i]}});
    end
    wire [WIDTH-1:0] complemented = selected ^ {WIDTH{negative}};
    assign value = {{(OUT-WIDTH){1'b0}}, complemented} << exponent;
endmodule

module offset_dot #(
    parameter GROUP = 8,
    parameter GROUPS = 1,
    parameter LANES = 4,
    parameter COLUMNS = 1,
    parameter WIDTH = 8,
    parameter PSUM = 28,
    parameter RIPPLE = 1,    // the carry-propagating adder is a chain of full adders
    parameter EXPONENT = $clog2(WIDTH),
    parameter TERM = 1 + EXPONENT + GROUP
) (
    input                                          clock,
    input                                          load,
    input      [COLUMNS*GROUPS*GROUP*WIDTH-1:0]    activations_in,
    input      [GROUPS*LANES*TERM-1:0]             terms_in,  // {select, sign, exponent}
    output reg [GROUPS*LANES*TERM-1:0]             terms,
    input      [COLUMNS*PSUM-1:0]                  psum_in,
    output reg [COLUMNS*PSUM-1:0]                  psum
);
    localparam ALL = GROUPS * LANES;
    localparam OUT = 2 * WIDTH - 1;

    reg [COLUMNS*GROUPS*GROUP*WIDTH-1:0] activations;  // taken from the column's bus with `load`
    genvar c, l;
    generate
        for (c = 0; c < COLUMNS; c = c + 1) begin : column
            wire [(ALL+1)*PSUM-1:0] words;
            wire [PSUM-1:0] sum, carry;
            for (l = 0; l < ALL; l = l + 1) begin : lane
                wire [OUT-1:0] value;
                offset_lane #(.GROUP(GROUP), .WIDTH(WIDTH)) one (
                    .activations(activations[(c*GROUPS + l/LANES)*GROUP*WIDTH +: GROUP*WIDTH]),
                    .select(terms_in[l*TERM + EXPONENT + 1 +: GROUP]),
                    .negative(terms_in[l*TERM + EXPONENT]),
                    .exponent(terms_in[l*TERM +: EXPONENT]),
                    .value(value)
                );
                assign words[l*PSUM +: PSUM] = {{(PSUM-OUT){1'b0}}, value};
            end
            assign words[ALL*PSUM +: PSUM] = psum_in[c*PSUM +: PSUM];
            carry_save_tree #(.WORDS(ALL+1), .WIDTH(PSUM)) tree (
                .words(words), .low({(ALL-1){1'b0}}), .sum(sum), .carry(carry)
            );
            wire [PSUM-1:0] total;
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
        terms <= terms_in;
    end
endmodule
