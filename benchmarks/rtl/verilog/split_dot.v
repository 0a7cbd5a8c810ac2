// Feed-forward group PE with separate sums of added and of subtracted terms.
//
// As in offset_dot activations are unsigned, but a subtracted term is not complemented: each lane's
// value goes to one of two carry-save trees, and one subtraction a pass joins them. A zero stays a
// zero whatever its sign, so zero activations and empty slots keep both trees still, and as lanes
// take added terms from below and subtracted ones from above, most lanes feed one tree alone. The
// sums come out 2 * (2^MINUS - 1) too large: a constant, taken off with the bias.
module split_lane #(
    parameter GROUP = 8,
    parameter WIDTH = 8,
    parameter EXPONENT = $clog2(WIDTH),
    parameter OUT = 2 * WIDTH - 1
) (
    input  [GROUP*WIDTH-1:0] activations,
    input  [GROUP-1:0]       select,    // one-hot; all zero: an empty slot
    input                    negative,
    input  [EXPONENT-1:0]    exponent,
    output [OUT-1:0]         added,
    output [OUT-1:0]         subtracted
);
    integer i;
    reg [WIDTH-1:0] selected;
    always @* begin
        selected = {WIDTH{1'b0}};
        for (i = 0; i < GROUP; i = i + 1)
            selected = selected | (activations[i*WIDTH +: WIDTH] & {WIDTH{select[i]}});
    end
    wire [OUT-1:0] value = {{(OUT-WIDTH){1'b0}}, selected} << exponent;
    assign added = value & {OUT{~negative}};
    assign subtracted = value & {OUT{negative}};
endmodule

module split_dot #(
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
    localparam MINUS = OUT + $clog2(ALL);  // bits of the subtracted terms' sum

    reg [COLUMNS*GROUPS*GROUP*WIDTH-1:0] activations;  // taken from the column's bus with `load`
    genvar c, l;
    generate
        for (c = 0; c < COLUMNS; c = c + 1) begin : column
            wire [(ALL+1)*PSUM-1:0] plus;
            wire [ALL*MINUS-1:0] minus;
            wire [PSUM-1:0] plus_sum, plus_carry, sum, carry;
            wire [MINUS-1:0] minus_sum, minus_carry;
            for (l = 0; l < ALL; l = l + 1) begin : lane
                wire [OUT-1:0] added, subtracted;
                split_lane #(.GROUP(GROUP), .WIDTH(WIDTH)) one (
                    .activations(activations[(c*GROUPS + l/LANES)*GROUP*WIDTH +: GROUP*WIDTH]),
                    .select(terms_in[l*TERM + EXPONENT + 1 +: GROUP]),
                    .negative(terms_in[l*TERM + EXPONENT]),
                    .exponent(terms_in[l*TERM +: EXPONENT]),
                    .added(added), .subtracted(subtracted)
                );
                assign plus[l*PSUM +: PSUM] = {{(PSUM-OUT){1'b0}}, added};
                assign minus[l*MINUS +: MINUS] = {{(MINUS-OUT){1'b0}}, subtracted};
            end
            assign plus[ALL*PSUM +: PSUM] = psum_in[c*PSUM +: PSUM];
            carry_save_tree #(.WORDS(ALL+1), .WIDTH(PSUM)) plus_tree (
                .words(plus), .low({(ALL-1){1'b0}}), .sum(plus_sum), .carry(plus_carry)
            );
            carry_save_tree #(.WORDS(ALL), .WIDTH(MINUS)) minus_tree (
                .words(minus), .low({(ALL-2){1'b0}}), .sum(minus_sum), .carry(minus_carry)
            );
            carry_save_tree #(.WORDS(4), .WIDTH(PSUM)) difference (
                .words({plus_carry, plus_sum, {{(PSUM-MINUS){1'b0}}, ~minus_carry},
                        {{(PSUM-MINUS){1'b0}}, ~minus_sum}}),
                .low(2'b00), .sum(sum), .carry(carry)
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
